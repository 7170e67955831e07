"""Text ↔ token ids by a Hugging Face `tokenizer.json`, read as vLLM reads it, and words → ids.

No torch here: the gateway and the intervention service use it too.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from backpack_lm import strict_json

END_OF_TEXT = "<|endoftext|>"
_MOST_TOKENS = 2**24


class WordError(ValueError):
    """A word that can't stand for one token: the word, its pieces, and what to ask for instead."""


class WordPolicy(Enum):
    """What to do with a word of several tokens."""

    SINGLE = "single"
    FIRST = "first"
    LAST = "last"
    ALL = "all"


class Tokenizer:
    """Byte-level BPE. Special tokens are only ever produced by id, never read out of a text."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        """Raises ValueError, with the fix, for a tokenizer of another kind, or whose ids can't be read back."""
        _check_byte_level(tokenizer)
        self._tokenizer = tokenizer
        # A client that writes "<|endoftext|>" gets those thirteen characters, not the token.
        self._tokenizer.encode_special_tokens = True
        # Files may ask for either, as training with them did: texts would be cut off, or go on, without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bytes = _bytes_of_tokens(tokenizer)
        self.vocab_size: int = len(self._bytes)
        self.end_of_text: int | None = tokenizer.token_to_id(END_OF_TEXT)
        self.bos_ids: tuple[int, ...] = _added_before(tokenizer)
        """What every text begins with, as the file's post-processor says; for vLLM and `AutoTokenizer`, too. What it
        would add behind a text is left out: a model goes on there."""
        self.longest: int = max(map(len, self._bytes))
        """Bytes of the longest token."""
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, one in added.items() if one.special)
        """Ids of tokens that the file calls special: marks, not words of a text."""

    @staticmethod
    def read(path: Path, digest: str | None = None) -> Tokenizer:
        """Read a `tokenizer.json`; with `digest`, only the file of this SHA-256 in hex.

        Raises ValueError naming the file if it isn't there, is another, or no tokenizer that a Backpack can have.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} is not a tokenizer: it can't be read: {error.strerror}") from None
        if digest is not None and (found := hashlib.sha256(data).hexdigest()) != digest:
            raise ValueError(
                f"{path} has SHA-256 {found[:12]}…, the manifest beside it says {digest[:12]}…: it was changed or "
                "damaged; import the model again"
            )
        try:
            return _tokenizer_of(data)
        except ValueError as error:
            raise ValueError(f"{path} is not a tokenizer: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a text that may stand anywhere."""
        (ids,) = self.encode_batch([text])  # a single text's `encode` keeps all other threads waiting meanwhile
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text from its beginning, as a model reads or continues it."""
        return [*self.bos_ids, *self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD."""
        # Not by the library: it reads letters of added tokens as bytes. Ids beyond the vocabulary have no text.
        known = (self._bytes[token] for token in ids if 0 <= token < len(self._bytes))
        return b"".join(known).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 that a token stands for; it may begin or end within a character."""
        return self._bytes[token]

    def piece(self, token: int) -> str:
        """One token as text, its leading space kept."""
        return self._bytes[token].decode("utf-8", "replace")

    def word_ids(self, word: str, policy: WordPolicy = WordPolicy.SINGLE) -> tuple[int, ...]:
        """The ids that stand for a word, encoded with a leading space, as words stand in texts: " nurse".

        A token of the vocabulary spelled out with its own leading space is taken as it is. Raises
        WordError if the word is empty, or has several tokens and `policy` is SINGLE.
        """
        if not word.strip():
            raise WordError(f"{word!r} is not a word")
        ids = self.encode(" " + word.strip())
        if policy is WordPolicy.ALL:
            return tuple(ids)
        if policy in (WordPolicy.FIRST, WordPolicy.LAST):
            return (ids[0 if policy is WordPolicy.FIRST else -1],)
        if len(ids) > 1:
            pieces = " + ".join(repr(self.piece(i)) for i in ids)
            raise WordError(
                f"{word!r} is {len(ids)} tokens ({pieces}); choose another word, or ask for its first token, its last "
                "or all of them: --tokens of commands that edit, or a word's `policy` in the API and in patch files"
            )
        return (ids[0],)

    def forms(self, word: str, any_case: bool = False) -> dict[str, tuple[int | None, int | None]]:
        """The ids that are a word within a text (" nurse") and at the start of one ("nurse"), None for a form that is
        not one token; with `any_case` in lower case, capitalised and in capitals, too. By spelling, `word` first.
        """
        word = word.strip()
        spellings = dict.fromkeys([word, *([word.lower(), word.capitalize(), word.upper()] if any_case else [])])
        return {one: (self._single(f" {one}"), self._single(one)) for one in spellings if one}

    def _single(self, text: str) -> int | None:
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None


@lru_cache(maxsize=4)
def _tokenizer_of(data: bytes) -> Tokenizer:
    """Services in one process read the same file: a large vocabulary takes half a second."""
    return Tokenizer(_read(data))


def _read(data: bytes) -> HFTokenizer:
    """Raises ValueError without the file's name."""
    if strict_json.is_lfs_pointer(data):
        raise ValueError("it is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder")
    values = strict_json.parse(data, finite=False)
    if not isinstance(values, dict) or "model" not in values:
        raise ValueError('it has no "model"; give the tokenizer.json that the tokenizers library writes')
    try:
        return HFTokenizer.from_str(data.decode(strict_json.UTF8))  # of equal keys it would take the last
    except Exception:  # tokenizers raises bare Exception, and names its own types
        raise ValueError(
            f"tokenizers {tokenizers.__version__}, which is installed, can't read it; write it again with "
            "`save_pretrained` of a current transformers, or install the tokenizers that wrote it"
        ) from None


def _check_byte_level(tokenizer: HFTokenizer) -> None:
    """Raise ValueError for a vocabulary that spells other things than bytes: its texts would come out wrong."""
    model = tokenizer.model
    if not isinstance(model, models.BPE):
        raise ValueError(f"its model is {type(model).__name__}; a Backpack's is byte-level BPE, as GPT-2's")
    decoder = tokenizer.decoder
    if decoder is not None and not isinstance(decoder, decoders.ByteLevel):
        raise ValueError(f"its decoder is {type(decoder).__name__}; that of byte-level BPE, as GPT-2's, is ByteLevel")
    steps = [*_steps(tokenizer.normalizer, normalizers), *_steps(tokenizer.pre_tokenizer, pre_tokenizers)]
    if not any(isinstance(step, (normalizers.ByteLevel, pre_tokenizers.ByteLevel)) for step in steps):
        raise ValueError("nothing in it turns texts into bytes; a Backpack's is byte-level BPE, as GPT-2's")
    for name in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if value := getattr(model, name):
            raise ValueError(f"its {name} is {value!r}, which byte-level BPE, as GPT-2's, doesn't have")


def _steps(step: object, kinds: object) -> list[object]:
    """The steps of a normalizer or pre-tokenizer, those of sequences one by one."""
    if step is None:
        return []
    if isinstance(step, kinds.Sequence):  # type: ignore[attr-defined]
        return [one for part in step for one in _steps(part, kinds)]
    return [step]


def begin_texts(tokenizer: HFTokenizer, token: str) -> None:
    """Let every text begin with a special token, if its post-processor puts nothing there yet."""
    if _added_before(tokenizer):
        return
    own = [tokenizer.post_processor] if tokenizer.post_processor else []
    special = [(token, tokenizer.token_to_id(token))]
    template = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=special
    )
    tokenizer.post_processor = processors.Sequence([*own, template])


def _added_before(tokenizer: HFTokenizer) -> tuple[int, ...]:
    """The ids that the post-processor puts before a text."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    return tuple(encoding.ids[: encoding.special_tokens_mask.index(0)])


def _bytes_of_tokens(tokenizer: HFTokenizer) -> list[bytes]:
    """What each id stands for. A byte-level vocabulary spells every byte as one printable character (Radford et
    al. 2019); a token that was added to it stands for its own text, whatever letters it has."""
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    added = {token: one.content for token, one in tokenizer.get_added_tokens_decoder().items()}
    spelled = {token: spelling for spelling, token in vocabulary.items()}
    if len(spelled) < len(vocabulary):
        twice = next(token for spelling, token in vocabulary.items() if spelled[token] != spelling)
        raise ValueError(f"several tokens have the id {twice}, {spelled[twice]!r} among them")
    if not spelled or max(spelled) >= _MOST_TOKENS:
        raise ValueError(f"its largest id is {max(spelled, default=None)}; it must be at most {_MOST_TOKENS - 1}")
    _check_added(tokenizer, added)
    found = [b""] * (max(spelled) + 1)
    for token, spelling in spelled.items():
        found[token] = added[token].encode() if token in added else _bytes_of(spelling)
    return found


def _bytes_of(spelling: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF.__getitem__, spelling))
    except KeyError:  # in no text's encoding: BPE makes spellings of bytes alone
        return spelling.encode()


def _check_added(tokenizer: HFTokenizer, added: dict[int, str]) -> None:
    """Raise ValueError for an added token whose id also stands for other bytes, as BPE makes it out of texts."""
    unclear = {token: text for token, text in added.items() if _bytes_of(text) != text.encode()}
    if not unclear:
        return
    model = json.loads(tokenizer.to_str())["model"]
    made = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "", 1) for pair in model["merges"]}
    for token, text in unclear.items():
        in_vocabulary = text in model["vocab"]
        if in_vocabulary and (len(text) == 1 or text in made or model.get("ignore_merges")):
            raise ValueError(
                f"the id {token} stands for the added token {text!r} and for the bytes {_bytes_of(text)!r}, which "
                "the vocabulary spells alike: no text comes back from it. Give the added token an id of its own"
            )


def _byte_of() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_of()


class Detokenizer:
    """Text of a growing sequence, token by token, never a broken character.

    A character whose bytes are still to come is held back; bytes that can't be one become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: Iterable[int]) -> str:
        """The text that these tokens make final."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, tokens)))

    def flush(self) -> str:
        """What was held back, when no more tokens will come."""
        return self._decoder.decode(b"", final=True)
