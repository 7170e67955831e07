"""Edits on the wire ↔ edits of `backpack_lm.patch`: resolves words to token ids and expands cells.

All violations of a list of edits are reported together, each with its field's path. Reading stops early at more
cells than a revision may have, or at MOST_WRONG violations.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from backpack_lm import patch
from backpack_lm.patch import Cell, PatchLimits, Vector, Violation
from backpack_lm.tokenizer import Tokenizer, WordError, WordPolicy
from backpack_proto.v1 import inference_pb2, interventions_pb2

from backpack_serving.errors import InvalidRequest

WORD_POLICIES = {
    inference_pb2.WORD_POLICY_UNSPECIFIED: WordPolicy.SINGLE,
    inference_pb2.WORD_POLICY_SINGLE: WordPolicy.SINGLE,
    inference_pb2.WORD_POLICY_FIRST_TOKEN: WordPolicy.FIRST,
    inference_pb2.WORD_POLICY_LAST_TOKEN: WordPolicy.LAST,
    inference_pb2.WORD_POLICY_ALL_TOKENS: WordPolicy.ALL,
}

LONGEST_WORD = 256
"""Most bytes of a word for one token: encoding a megabyte would block a server's event loop."""

MOST_WRONG = 1000
"""Most violations reported: a megabyte may hold half a million, at 400 bytes each."""

MOST_WORDS = 4096
"""Most words of a topic or bias. They may outnumber its tokens, because several can share one."""

FORMS = {interventions_pb2.DATA_TYPE_FLOAT32: "f", interventions_pb2.DATA_TYPE_FLOAT16: "e"}
"""`struct` format of each data type."""


_INITIAL = inference_pb2.WordForm.Name(inference_pb2.WORD_FORM_INITIAL)


class WordReader:
    """Resolves words of requests to token ids of one model. Omitted senses mean all senses."""

    def __init__(self, tokenizer: Tokenizer, num_senses: int, limits: PatchLimits = PatchLimits()) -> None:
        self._tokenizer, self._num_senses, self._limits = tokenizer, num_senses, limits
        self._count = self._biased = 0
        self.violations: list[Violation] = []

    def refuse(self, field: str, reason: str, description: str) -> None:
        """Record a violation. Raises InvalidRequest with all of them once there are MOST_WRONG."""
        self.violations.append(Violation(field, reason, description))
        if len(self.violations) == MOST_WRONG:
            raise InvalidRequest.of(*self.violations)

    def tokens(
        self,
        field: str,
        word: inference_pb2.Word,
        form: inference_pb2.WordForm.ValueType = inference_pb2.WORD_FORM_INNER,
    ) -> tuple[int, ...]:
        """The token ids of a word, in `form` unless it names another; empty, with a violation recorded, for an invalid
        word."""
        if word.HasField("token"):
            if word.token >= self._tokenizer.vocab_size:
                last = self._tokenizer.vocab_size - 1
                self.refuse(field, "UNKNOWN_TOKEN", f"token {word.token}; this model's are 0 to {last}")
                return ()
            return (word.token,)
        if word.policy not in WORD_POLICIES:
            self.refuse(
                f"{field}.policy",
                "UNKNOWN_VALUE",
                f"{word.policy}; use {' or '.join(inference_pb2.WordPolicy.keys()[1:])}",
            )
            return ()
        form = word.form or form
        if form not in inference_pb2.WordForm.values():
            names = " or ".join(inference_pb2.WordForm.keys()[1:])
            self.refuse(f"{field}.form", "UNKNOWN_VALUE", f"{word.form}; use {names}")
            return ()
        policy = WORD_POLICIES[word.policy]
        # Megabytes would be encoded for ten seconds, and their tokens be more than a revision may name.
        most = self._limits.cells * self._tokenizer.longest if policy is WordPolicy.ALL else LONGEST_WORD
        if (size := len(word.text.encode())) > most:
            self.refuse(field, "TOO_LONG", f"a word of {size} bytes; at most {most}")
            return ()
        single = self._forms(word, form)
        try:
            # Of what isn't one token within a text, the policy decides.
            inner = () if form == inference_pb2.WORD_FORM_INITIAL else self._tokenizer.word_ids(word.text, policy)
        except WordError as error:
            alone = ""
            if single and form == inference_pb2.WORD_FORM_BOTH:
                alone = f"; at the start of a text it is one: to edit that alone, name its form {_INITIAL}"
            self.refuse(field, "NOT_ONE_TOKEN" if word.text.strip() else "EMPTY", f"{error}{alone}")
            return ()
        if not (inner or single):
            why = f"{word.text!r} at the start of a text is several tokens; choose another word, or its form in a text"
            self.refuse(field, "NOT_ONE_TOKEN" if word.text.strip() else "EMPTY", why)
        return (*inner, *(token for token in dict.fromkeys(single) if token not in inner))

    def _forms(self, word: inference_pb2.Word, form: inference_pb2.WordForm.ValueType) -> tuple[int, ...]:
        """Those forms and cases of a word that are one token."""
        if form == inference_pb2.WORD_FORM_INNER and not word.any_case:
            return ()  # as `word_ids` has it
        if len(word.text.encode()) > LONGEST_WORD:
            return ()
        found: list[int] = []
        for inner, initial in self._tokenizer.forms(word.text, word.any_case).values():
            wanted = {
                inference_pb2.WORD_FORM_INNER: (inner,),
                inference_pb2.WORD_FORM_INITIAL: (initial,),
                inference_pb2.WORD_FORM_BOTH: (inner, initial),
            }[form]
            found += [token for token in wanted if token is not None]
        return tuple(found)

    def spellings(self, field: str, word: inference_pb2.Word) -> tuple[int, ...]:
        """`tokens`, in both forms unless the word names one.

        Raises InvalidRequest for more than a revision's biases may name, over all calls.
        """
        found = self.tokens(field, word, inference_pb2.WORD_FORM_BOTH)
        self._biased += len(found)
        if self._biased > self._limits.biased:
            why = f"biases of {self._biased} tokens by {field}, at most {self._limits.biased}"
            self.refuse("edits", "TOO_MANY_WORDS", why)
            raise InvalidRequest.of(*self.violations)
        return found

    def token(self, field: str, word: inference_pb2.Word) -> int:
        """The single token id of a word; 0, with a violation recorded, if it has several or none."""
        if not word.HasField("token") and (size := len(word.text.encode())) > LONGEST_WORD:
            self.refuse(field, "TOO_LONG", f"a word of {size} bytes; at most {LONGEST_WORD}")
            return 0
        found = self.tokens(field, word)
        if len(found) > 1:
            self.refuse(field, "NOT_ONE_TOKEN", f"{word.text!r} is {len(found)} tokens; here it must be one")
        return found[0] if found else 0

    def cells(self, field: str, message: interventions_pb2.Cells) -> tuple[Cell, ...]:
        """Expand a word and its senses into cells.

        Raises InvalidRequest for too many before it allocates them: a short message may expand beyond memory.
        """
        tokens = self.tokens(f"{field}.word", message.word)
        if not tokens:
            return ()
        self._count += len(tokens) * (len(message.senses) or self._num_senses)
        if self._count > self._limits.cells:
            self.refuse("edits", "TOO_MANY_CELLS", f"{self._count} cells by {field}, at most {self._limits.cells}")
            raise InvalidRequest.of(*self.violations)
        senses = list(message.senses) or range(self._num_senses)
        return tuple(Cell(t, s) for t, s in product(tokens, senses))

    def all_cells(self, field: str, messages: Sequence[interventions_pb2.Cells]) -> tuple[Cell, ...]:
        """The cells of an edit; records a violation if it names no word. Raises as `cells` does."""
        if not messages:
            self.refuse(field, "EMPTY", "names no word; give at least one")
        parts = (self.cells(f"{field}[{at}]", message) for at, message in enumerate(messages))
        return tuple(cell for part in parts for cell in part)

    def vector(self, field: str, message: interventions_pb2.Vector) -> Vector:
        """The numbers of a vector; empty, with a violation recorded, if the data don't match type and shape."""
        if (form := FORMS.get(message.dtype)) is None:
            self.refuse(f"{field}.dtype", "UNKNOWN_VALUE", f"{message.dtype}; use FLOAT32 or FLOAT16")
            return Vector()
        size = struct.calcsize(form)
        if len(message.shape) != 1 or message.shape[0] * size != len(message.data):
            text = f"shape {_shape_text(message.shape)} of {size}-byte numbers, but {len(message.data)} bytes of data"
            self.refuse(field, "WRONG_SHAPE", f"{text}; give one size, and as many numbers")
            return Vector()
        return Vector.of(struct.unpack(f"<{message.shape[0]}{form}", message.data))


def _shape_text(shape: Sequence[int]) -> str:
    """A shape for an error message; long ones (up to millions of sizes) are cut."""
    return str(list(shape)) if len(shape) <= 8 else f"{list(shape[:8])}… of {len(shape)} sizes"


def read_edits(
    messages: Sequence[interventions_pb2.Edit],
    tokenizer: Tokenizer,
    num_senses: int,
    limits: PatchLimits = PatchLimits(),
) -> list[patch.Edit]:
    """Read the edits of a request. Raises InvalidRequest with all violations."""
    if len(messages) > (most := limits.cells + limits.topics + limits.biased):  # each has a cell or more, or is a topic
        raise InvalidRequest.at("edits", "TOO_MANY_EDITS", f"{len(messages)}, at most {most}")
    reader = WordReader(tokenizer, num_senses, limits)
    edits: list[patch.Edit] = []
    for at, message in enumerate(messages):
        kind = message.WhichOneof("kind")
        if kind is None:
            reader.refuse(
                f"edits[{at}]",
                "UNKNOWN_KIND",
                f"no kind of edit that this server knows; give one of {', '.join(_READ)}",
            )
            continue
        edits.append(_READ[kind](reader, f"edits[{at}].{kind}", getattr(message, kind)))
    if reader.violations:
        raise InvalidRequest.of(*reader.violations)
    return edits


def _read_scale(read: WordReader, at: str, message: interventions_pb2.ScaleEdit) -> patch.Edit:
    return patch.ScaleEdit(read.all_cells(f"{at}.cells", message.cells), message.factor)


def _read_add(read: WordReader, at: str, message: interventions_pb2.AddEdit) -> patch.Edit:
    delta = read.vector(f"{at}.delta", message.delta)
    return patch.AddEdit(read.all_cells(f"{at}.cells", message.cells), delta)


def _read_set(read: WordReader, at: str, message: interventions_pb2.SetEdit) -> patch.Edit:
    vector = read.vector(f"{at}.vector", message.vector)
    return patch.SetEdit(read.all_cells(f"{at}.cells", message.cells), vector)


def _read_copy(read: WordReader, at: str, message: interventions_pb2.CopyEdit) -> patch.Edit:
    source = read.token(f"{at}.source", message.source)
    sense = message.source_sense if message.HasField("source_sense") else None
    return patch.CopyEdit(read.all_cells(f"{at}.cells", message.cells), source, sense)


def _read_project_out(read: WordReader, at: str, message: interventions_pb2.ProjectOutEdit) -> patch.Edit:
    cells = read.all_cells(f"{at}.cells", message.cells)
    return patch.ProjectOutEdit(cells, read.token(f"{at}.direction", message.direction))


def _read_swap(read: WordReader, at: str, message: interventions_pb2.SwapEdit) -> patch.Edit:
    cells = read.all_cells(f"{at}.cells", message.cells)
    return patch.SwapEdit(cells, read.token(f"{at}.old", message.old), read.token(f"{at}.new", message.new))


def _read_topic(read: WordReader, at: str, message: interventions_pb2.TopicEdit) -> patch.Edit:
    tokens: dict[int, None] = {}  # a set that keeps the order
    if len(message.words) > MOST_WORDS:
        read.refuse(f"{at}.words", "TOO_MANY_WORDS", f"{len(message.words)}, at most {MOST_WORDS}")
    for number, word in enumerate(message.words[:MOST_WORDS]):
        first = inference_pb2.Word(text=word.text, policy=inference_pb2.WORD_POLICY_FIRST_TOKEN)
        tokens.update(dict.fromkeys(read.tokens(f"{at}.words[{number}]", word if word.HasField("token") else first)))
    if not 0 <= message.strength <= 255:
        read.refuse(f"{at}.strength", "OUT_OF_RANGE", f"{message.strength}; use 1, 2 or 3")
    return patch.TopicEdit(tuple(tokens), message.strength & 255, annealed=not message.constant)


def _read_bias(read: WordReader, at: str, message: interventions_pb2.BiasEdit) -> patch.Edit:
    if len(message.words) > MOST_WORDS:
        read.refuse(f"{at}.words", "TOO_MANY_WORDS", f"{len(message.words)}, at most {MOST_WORDS}")
    some = (read.spellings(f"{at}.words[{n}]", word) for n, word in enumerate(message.words[:MOST_WORDS]))
    return patch.BiasEdit(tuple(dict.fromkeys(token for tokens in some for token in tokens)), message.amount)


_READ: dict[str, Callable[[WordReader, str, Any], patch.Edit]] = {
    "scale": _read_scale,
    "add": _read_add,
    "set": _read_set,
    "copy": _read_copy,
    "project_out": _read_project_out,
    "swap": _read_swap,
    "topic": _read_topic,
    "bias": _read_bias,
}


def write_edit(edit: patch.Edit, tokenizer: Tokenizer) -> interventions_pb2.Edit:
    """An edit as a message, every id with its word."""
    pb = interventions_pb2

    def word(token: int) -> inference_pb2.Word:
        return inference_pb2.Word(text=tokenizer.piece(token), token=token)

    def cells(some: Sequence[Cell]) -> list[interventions_pb2.Cells]:
        by_token: dict[int, list[int]] = {}
        for cell in some:
            by_token.setdefault(cell.token, []).append(cell.sense)
        return [pb.Cells(word=word(token), senses=senses) for token, senses in by_token.items()]

    def vector(packed: Vector) -> interventions_pb2.Vector:
        return pb.Vector(data=bytes(packed), dtype=pb.DATA_TYPE_FLOAT32, shape=[len(packed) // 4])

    match edit:
        case patch.ScaleEdit():
            return pb.Edit(scale=pb.ScaleEdit(cells=cells(edit.cells), factor=edit.factor))
        case patch.AddEdit():
            return pb.Edit(add=pb.AddEdit(cells=cells(edit.cells), delta=vector(edit.delta)))
        case patch.SetEdit():
            return pb.Edit(set=pb.SetEdit(cells=cells(edit.cells), vector=vector(edit.vector)))
        case patch.CopyEdit():
            copied = pb.CopyEdit(cells=cells(edit.cells), source=word(edit.source), source_sense=edit.source_sense)
            return pb.Edit(copy=copied)
        case patch.ProjectOutEdit():
            return pb.Edit(project_out=pb.ProjectOutEdit(cells=cells(edit.cells), direction=word(edit.direction)))
        case patch.SwapEdit():
            return pb.Edit(swap=pb.SwapEdit(cells=cells(edit.cells), old=word(edit.old), new=word(edit.new)))
        case patch.TopicEdit():
            words = [word(token) for token in edit.tokens]
            return pb.Edit(topic=pb.TopicEdit(words=words, strength=edit.strength, constant=not edit.annealed))
        case patch.BiasEdit():
            return pb.Edit(bias=pb.BiasEdit(words=[word(token) for token in edit.tokens], amount=edit.amount))
