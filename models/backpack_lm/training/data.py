"""Training text: JSON-lines files → a byte-level BPE → memory-mapped token streams.

A record is one JSON object a line with a `text`, or with `input_ids` where it is tokenised already. Each source
file becomes two streams of uint16 ids, a held-out one and one to train on; which a record goes to depends on the hash
of its text alone, so it is the same for every run, machine and order.
"""

from __future__ import annotations

import hashlib
import lzma
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from backpack_lm import strict_json
from backpack_lm.counted import counted
from backpack_lm.manifest import file_digest
from backpack_lm.tokenizer import END_OF_TEXT, Tokenizer

HELD_OUT_PER_MILLE = 15
PARAGRAPHS = 4096  # how many paragraphs are tokenised at a time
PASSAGE = 512  # tokens after which the next paragraph begins a new passage
FROM_START = 0.25

Ids = npt.NDArray[np.uint16]
MOST_TOKENS = 2**16
"""Of a vocabulary whose streams can be written."""


class DataError(ValueError):
    """A corpus file that can't be used, with its line and what is wrong."""


@dataclass(frozen=True, slots=True)
class Source:
    """One JSON-lines file, .xz or not, and its share of the training rows."""

    path: Path
    share: float = 1.0

    @classmethod
    def parse(cls, argument: str) -> Source:
        """PATH or PATH:SHARE. Raises DataError if the share isn't a positive number."""
        path, _, share = argument.rpartition(":")
        if not path:
            return cls(Path(argument))
        try:
            value = float(share)
        except ValueError:
            raise DataError(f"{argument!r}: share {share!r} is not a number") from None
        if not 0 < value < float("inf"):
            raise DataError(f"{argument!r}: a share must be positive")
        return cls(Path(path), value)

    @property
    def name(self) -> str:
        return self.path.name.split(".")[0]

    def digest(self) -> str:
        """SHA-256 of the file, in hex."""
        return file_digest(self.path)

    def records(self) -> Iterator[tuple[str, bool]]:
        """Each record's text, and whether it is held out. Raises DataError naming the file or the bad line, also if
        that is tokenised already."""
        for number, (content, held_out) in enumerate(self.contents(), 1):
            if not isinstance(content, str):
                raise DataError(f"{self.path}:{number}: it has input_ids; text is needed here")
            yield content, held_out

    def contents(self) -> Iterator[tuple[str | list[int], bool]]:
        """Each record's text or ids, and whether it is held out. Raises DataError naming the file or the bad line."""
        opener = lzma.open if self.path.suffix == ".xz" else Path.open
        with opener(self.path, "rt", encoding=strict_json.UTF8) as lines:
            try:
                for number, line in enumerate(lines, 1):
                    yield self._record(number, line)
            except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
                raise DataError(f"{self.path} can't be read to its end: {error}") from None

    def _record(self, number: int, line: str) -> tuple[str | list[int], bool]:
        try:
            record = strict_json.parse(line)
            content: str | list[int] = record["input_ids"] if "input_ids" in record else record["text"]
            spelled = array("I", content).tobytes() if "input_ids" in record else content.encode()  # type: ignore[union-attr]
            digest = hashlib.sha256(spelled).digest()
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(f"{self.path}:{number}: not a record with a text or input_ids: {error!r}") from None
        return content, int.from_bytes(digest[:4], "little") % 1000 < HELD_OUT_PER_MILLE


def parse_sources(arguments: Sequence[str]) -> list[Source]:
    """Sources that differ in their names, by which their streams are kept. Raises DataError if two don't, or an
    argument is none."""
    found: dict[str, Source] = {}
    for source in map(Source.parse, arguments):
        if (other := found.setdefault(source.name, source)) is not source:
            raise DataError(
                f"{other.path} and {source.path} are both called {source.name!r}, by what stands before the "
                "first dot; rename one, or put both into one file"
            )
    return list(found.values())


def train_tokenizer(sources: Sequence[Source], vocab_size: int, out: Path) -> Tokenizer:
    """Learn a byte-level BPE from the training part of the sources and write it to `out`."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    texts = (text for source in sources for text, held_out in source.records() if not held_out)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(out), pretty=False)
    return Tokenizer.read(out)


def is_encoded(source: Source, folder: Path) -> bool:
    """Whether a source's streams are there. Raises DataError if they were made from a file with other content."""
    if not (folder / f"{source.name}.heldout.bin").exists():
        return False
    made_from = _made_from(source, folder)  # earlier versions wrote none
    if made_from.exists() and made_from.read_text("utf-8") != source.digest():
        raise DataError(
            f"{folder} holds the tokens of a {source.path.name} with other content; give another --out, or the "
            "file as it was"
        )
    return True


def _made_from(source: Source, folder: Path) -> Path:
    return folder / f"{source.name}.sha256"


def encode(source: Source, tokenizer: Tokenizer, folder: Path) -> Iterator[float]:
    """Write `<name>.train.bin` and `<name>.heldout.bin`: passages, each after an end-of-text token; and before
    them `<name>.sha256`, which says of what file.

    A passage is a record or, of a long one, whole paragraphs of at least PASSAGE tokens. A book has one
    beginning in a hundred thousand tokens: from that alone, a model never learns how a text starts.

    Yields the fraction that is done; the files are there when it ends.
    """
    if tokenizer.end_of_text is None:
        raise DataError(f"the tokenizer has no {END_OF_TEXT} token to part records with")
    if tokenizer.vocab_size > MOST_TOKENS:
        raise DataError(f"the tokenizer has {tokenizer.vocab_size} tokens; {MOST_TOKENS} can be told apart here")
    _made_from(source, folder).write_text(source.digest(), "utf-8")
    records = list(source.contents())
    paths = [folder / f"{source.name}.{part}.bin" for part in ("train", "heldout")]
    partial = [path.with_suffix(".partial") for path in paths]
    with partial[0].open("wb") as train, partial[1].open("wb") as heldout:
        for number, (content, held_out) in enumerate(records, 1):
            if isinstance(content, str):
                ids = np.fromiter(_passages(content, tokenizer, tokenizer.end_of_text), dtype=np.uint16)
            elif not all(0 <= token < tokenizer.vocab_size for token in content):
                raise DataError(
                    f"{source.path}:{number}: its input_ids aren't all below the tokenizer's {tokenizer.vocab_size}"
                )
            else:
                ids = np.array([tokenizer.end_of_text, *content], dtype=np.uint16)
            (heldout if held_out else train).write(ids.tobytes())
            yield number / len(records)
    for path, made in zip(paths, partial, strict=True):
        made.rename(path)


def _passages(text: str, tokenizer: Tokenizer, end: int) -> Iterator[int]:
    """Ids of a text as long as a book, by its lines, so that the tokenizer can use every core."""
    lines = text.splitlines(keepends=True)
    length, after_blank = PASSAGE, True
    for start in range(0, len(lines), PARAGRAPHS):
        batch = lines[start : start + PARAGRAPHS]
        for line, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            blank = not line.strip()
            if length >= PASSAGE and after_blank and not blank:
                yield end
                length = 0
            yield from ids
            length, after_blank = length + len(ids), blank


def count_tokens(source: Source, tokenizer: Tokenizer, counts: npt.NDArray[np.int64]) -> Iterator[float]:
    """Add how often each token stands in a source to `counts` [vocabulary], in the passages that `encode` makes of it.

    Yields the fraction that is done. Raises DataError as `encode` does.
    """
    records, none = list(source.contents()), -1
    end = none if tokenizer.end_of_text is None else tokenizer.end_of_text
    for number, (content, _) in enumerate(records, 1):
        tokens = _passages(content, tokenizer, end) if isinstance(content, str) else content
        ids = np.fromiter(tokens, dtype=np.int64)
        if ids.max(initial=none) >= len(counts):
            raise DataError(f"{source.path}:{number}: it has the token {ids.max()}; the tokenizer has {len(counts)}")
        counts += np.bincount(ids[ids != none], minlength=len(counts))
        yield number / len(records)


class Rows:
    """Rows of ids for one step, drawn at random places of the sources by their shares.

    A share FROM_START of them begins with a passage and its end-of-text token, as generated text may.
    What a step gets depends on (seed, step) alone: a run that was stopped goes on exactly as it would have.
    """

    def __init__(
        self,
        streams: Sequence[Ids],
        shares: Sequence[float],
        seed: int,
        end: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.streams, self.seed = streams, seed
        self.shares = np.array(shares) / sum(shares)
        self.starts = [np.flatnonzero(ids == end) for ids in streams]
        self.names = names or [str(number) for number in range(len(streams))]

    @classmethod
    def open(cls, sources: Sequence[Source], folder: Path, seed: int, end: int | None) -> Rows:
        streams = [stream(source, folder, "train") for source in sources]
        return cls(streams, [s.share for s in sources], seed, end, [s.name for s in sources])

    def text(self) -> list[list[str | float | int]]:
        """What rows are drawn from: the name of each source, its share of 1, its tokens."""
        sources = zip(self.names, self.shares.tolist(), self.streams, strict=True)
        return [[name, share, len(ids)] for name, share, ids in sources]

    def check(self, length: int) -> None:
        """Raises DataError for a source that doesn't fill a row of `length` inputs."""
        for name, ids in zip(self.names, self.streams, strict=True):
            if len(ids) <= length:
                raise DataError(f"{name} has {counted(len(ids), 'token')} to train on; a row takes {length + 1}")

    def at(self, step: int, count: int, length: int) -> npt.NDArray[np.int64]:
        """Rows [count, length + 1] of step `step`: each row's inputs and, one further, its targets."""
        random = np.random.default_rng([self.seed, step])
        chosen = random.choice(len(self.streams), size=count, p=self.shares)
        rows = np.empty((count, length + 1), dtype=np.int64)
        for row, source in zip(rows, chosen, strict=True):
            ids, starts = self.streams[source], self.starts[source]
            last = len(ids) - length - 1
            starts = starts[: np.searchsorted(starts, last, side="right")]
            from_start = len(starts) > 0 and random.random() < FROM_START
            start = int(random.choice(starts) if from_start else random.integers(last + 1))
            row[:] = ids[start : start + length + 1]
        return rows


def stream(source: Source, folder: Path, part: str) -> Ids:
    """A source's token stream, memory-mapped; `part` is "train" or "heldout". It may be empty."""
    path = folder / f"{source.name}.{part}.bin"
    if not path.stat().st_size:
        return np.empty(0, dtype=np.uint16)  # nothing can't be mapped
    return np.memmap(path, dtype=np.uint16, mode="r")
