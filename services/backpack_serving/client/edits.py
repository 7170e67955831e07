"""Edits of sense vectors and logits, by words: what a revision is made of. The server knows which tokens they are.

v is the vector of a cell: of a word's sense. `backpack_lm.edits` has the same edits by token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from backpack_lm.edits import Vector
from backpack_proto.v1 import inference_pb2
from backpack_proto.v1 import interventions_pb2 as pb

from backpack_serving.client.arguments import build, invalid_argument
from backpack_serving.client.requests import Word, word
from backpack_serving.client.results import Token
from backpack_serving.errors import InvalidRequest

Tokens = Literal["single", "first", "last", "all"]
Form = Literal["inner", "initial", "both"]

_POLICIES = {
    "single": inference_pb2.WORD_POLICY_UNSPECIFIED,
    "first": inference_pb2.WORD_POLICY_FIRST_TOKEN,
    "last": inference_pb2.WORD_POLICY_LAST_TOKEN,
    "all": inference_pb2.WORD_POLICY_ALL_TOKENS,
}


_FORMS = {
    "inner": inference_pb2.WORD_FORM_INNER,
    "initial": inference_pb2.WORD_FORM_INITIAL,
    "both": inference_pb2.WORD_FORM_BOTH,
}


@dataclass(frozen=True, slots=True)
class Cells:
    """Senses of a word, by their numbers; if none is given, all of them.

    A word of several tokens is refused, unless `tokens` asks for its "first", its "last", whose senses say most
    about what follows the word, or for "all". `form`: a word within a
    text (" London", "inner") and at the start of one ("London", "initial") are two tokens; "both" are those of them
    that are one token. With `any_case`, so are the word in lower case, capitalised and in capitals.
    """

    word: Word
    senses: tuple[int, ...] = ()
    tokens: Tokens = "single"
    form: Form = "inner"
    any_case: bool = False


Where = Word | Cells | Sequence[Word | Cells]
"""Which cells are edited: words with all their senses, or `Cells`; one, or several."""

Numbers = Vector | Sequence[float]
"""A vector: packed, as answers have it, or its numbers, which are sent as float32."""


@dataclass(frozen=True, slots=True)
class Scale:
    """v ← factor · v; factor 0 removes the senses."""

    cells: Where
    factor: float

    def message(self) -> pb.Edit:
        return pb.Edit(scale=build(pb.ScaleEdit, cells=_cells_message(self.cells), factor=self.factor))


@dataclass(frozen=True, slots=True)
class Add:
    """v ← v + delta, of as many numbers as the model is wide."""

    cells: Where
    delta: Numbers

    def message(self) -> pb.Edit:
        return pb.Edit(add=pb.AddEdit(cells=_cells_message(self.cells), delta=_vector_message("delta", self.delta)))


@dataclass(frozen=True, slots=True)
class Set:
    """v ← vector, of as many numbers as the model is wide."""

    cells: Where
    vector: Numbers

    def message(self) -> pb.Edit:
        vector = _vector_message("vector", self.vector)
        return pb.Edit(set=pb.SetEdit(cells=_cells_message(self.cells), vector=vector))


@dataclass(frozen=True, slots=True)
class Copy:
    """v ← the same sense of another word, or its `source_sense`."""

    cells: Where
    source: Word
    source_sense: int | None = None

    def message(self) -> pb.Edit:
        cells, source = _cells_message(self.cells), word(self.source, "source")
        return pb.Edit(copy=build(pb.CopyEdit, cells=cells, source=source, source_sense=self.source_sense))


@dataclass(frozen=True, slots=True)
class ProjectOut:
    """The senses no longer speak for or against a word: v ← v − c·r, r its embedding, c = (v·r)/(r·r)."""

    cells: Where
    direction: Word

    def message(self) -> pb.Edit:
        return pb.Edit(
            project_out=pb.ProjectOutEdit(cells=_cells_message(self.cells), direction=word(self.direction, "direction"))
        )


@dataclass(frozen=True, slots=True)
class Swap:
    """What the senses say of one word, they say of another: v ← v − c·r + c·a·(r·r)/(a·a)."""

    cells: Where
    old: Word
    new: Word

    def message(self) -> pb.Edit:
        return pb.Edit(
            swap=pb.SwapEdit(cells=_cells_message(self.cells), old=word(self.old, "old"), new=word(self.new, "new"))
        )


@dataclass(frozen=True, slots=True)
class Topic:
    """Lean towards a topic, given by words, with strength 1, 2 or 3.

    Multipliers fade as the topic appears, unless they are `constant`.
    """

    words: Sequence[Word]
    strength: int = 1
    constant: bool = False

    def message(self) -> pb.Edit:
        words = [word(each, f"words[{at}]") for at, each in enumerate(self.words)]
        return pb.Edit(topic=build(pb.TopicEdit, words=words, strength=self.strength, constant=self.constant))


@dataclass(frozen=True, slots=True)
class Bias:
    """Raise the logits of words by an amount, wherever they could come next: lower them below 0, forbid them with
    −∞ (`-math.inf`). Biases of one word add up.

    `tokens`, `form` and `any_case` are as in `Cells`, but a word stands for both of its forms unless told otherwise.
    """

    words: Sequence[Word]
    amount: float
    tokens: Tokens = "single"
    form: Form = "both"
    any_case: bool = False

    def message(self) -> pb.Edit:
        words = [word(each, f"words[{at}]") for at, each in enumerate(self.words)]
        for each in words:
            each.policy, each.form = _policy("tokens", self.tokens), _form("form", self.form)
            each.any_case = self.any_case
        return pb.Edit(bias=build(pb.BiasEdit, words=words, amount=self.amount))


Edit = Scale | Add | Set | Copy | ProjectOut | Swap | Topic | Bias


def read(message: pb.Edit) -> Edit:
    """An edit of an answer: every word with its token, every sense by its number."""
    kind = message.WhichOneof("kind")
    m: Any = getattr(message, kind) if kind else None
    match kind:
        case "scale":
            return Scale(_read_cells(m), m.factor)
        case "add":
            return Add(_read_cells(m), Vector(m.delta.data))
        case "set":
            return Set(_read_cells(m), Vector(m.vector.data))
        case "copy":
            sense = m.source_sense if m.HasField("source_sense") else None
            return Copy(_read_cells(m), _read_word(m.source), sense)
        case "project_out":
            return ProjectOut(_read_cells(m), _read_word(m.direction))
        case "swap":
            return Swap(_read_cells(m), _read_word(m.old), _read_word(m.new))
        case "topic":
            return Topic(tuple(map(_read_word, m.words)), m.strength, m.constant)
        case "bias":
            return Bias(tuple(map(_read_word, m.words)), m.amount)
    raise ValueError("the server knows a kind of edit that this client doesn't; install a newer backpack-serving")


def _cells_message(where: Where) -> list[pb.Cells]:
    some = where if isinstance(where, Sequence) and not isinstance(where, str) else (where,)
    found = []
    for at, one in enumerate(each if isinstance(each, Cells) else Cells(each) for each in some):
        spelled = word(one.word, f"cells[{at}].word")
        spelled.policy, spelled.form = _policy(f"cells[{at}].tokens", one.tokens), _form(f"cells[{at}].form", one.form)
        spelled.any_case = one.any_case
        found.append(build(pb.Cells, f"cells[{at}]", word=spelled, senses=one.senses))
    return found


def _policy(field: str, tokens: Tokens) -> inference_pb2.WordPolicy.ValueType:
    if tokens not in _POLICIES:
        raise InvalidRequest.at(field, "UNKNOWN_VALUE", f"{tokens!r}; write {', '.join(_POLICIES)}")
    return _POLICIES[tokens]


def _form(field: str, form: Form) -> inference_pb2.WordForm.ValueType:
    if form not in _FORMS:
        raise InvalidRequest.at(field, "UNKNOWN_VALUE", f"{form!r}; write {', '.join(_FORMS)}")
    return _FORMS[form]


def _vector_message(field: str, numbers: Numbers) -> pb.Vector:
    if not isinstance(numbers, bytes):
        try:
            numbers = Vector.of([float(number) for number in numbers])
        except (TypeError, ValueError, OverflowError) as error:
            raise invalid_argument(field, numbers, f"write a list of float32 numbers: {error}") from None
    return pb.Vector(data=numbers, dtype=pb.DATA_TYPE_FLOAT32, shape=[len(numbers) // 4])


def _read_cells(message: Any) -> tuple[Cells, ...]:
    return tuple(Cells(_read_word(cells.word), tuple(cells.senses)) for cells in message.cells)


def _read_word(message: inference_pb2.Word) -> Token:
    return Token(message.token, message.text)
