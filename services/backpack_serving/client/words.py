"""What a gateway says of words: a map of one sense of many, and where a word is used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.client.results import Served, Token, tokens


@dataclass(frozen=True, slots=True)
class MappedWord:
    """A word's place on a map of a sense; `norm` is |C(word)_sense|, `edited`: the release replaces it."""

    token: Token
    x: float
    y: float
    norm: float
    edited: bool


@dataclass(frozen=True, slots=True)
class MapAxis:
    """A direction of length 1. `share` of the variance of the words' vectors lies along it, 0 to 1. `positive` and
    `negative` are tokens whose logit rises most towards its ends, with E[token] · direction less the mean over all."""

    share: float
    positive: tuple[tuple[Token, float], ...]
    negative: tuple[tuple[Token, float], ...]

    @classmethod
    def of(cls, m: pb.MapAxis) -> MapAxis:
        return cls(m.share, _scored_tokens(m.positive), _scored_tokens(m.negative))


@dataclass(frozen=True, slots=True)
class SenseMap:
    """Where one sense of many words lies, in the order of the words.

    Without words to lie towards, x and y are coordinates along the two directions of most variance, from the mean. With
    some, x is what the sense adds to their logits, and y lies along the direction of most variance of what is left.
    """

    words: tuple[MappedWord, ...]
    x: MapAxis
    y: MapAxis
    served: Served

    @classmethod
    def of(cls, m: pb.MapSenseResponse) -> SenseMap:
        words = (MappedWord(Token.of(w.token), w.x, w.y, w.norm, w.edited) for w in m.words)
        return cls(tuple(words), MapAxis.of(m.x), MapAxis.of(m.y), Served.of(m.served))


@dataclass(frozen=True, slots=True)
class UsedSense:
    """What a sense of a word added to the logits of the tokens after it, each less the mean over the vocabulary; the
    place of the token that it added most to, in `WordUse.after`, and how much."""

    contribution: float
    strongest: int
    most: float


@dataclass(frozen=True, slots=True)
class WordUse:
    """A place of a word in a text: tokens of the same paragraph around it, and what its senses said, in their order."""

    before: tuple[Token, ...]
    after: tuple[Token, ...]
    senses: tuple[UsedSense, ...]

    @classmethod
    def of(cls, m: pb.WordUse) -> WordUse:
        senses = (UsedSense(s.contribution, s.strongest, s.most) for s in m.senses)
        return cls(tokens(m.before), tokens(m.after), tuple(senses))


@dataclass(frozen=True, slots=True)
class WordUses:
    """Uses of a word in the model's held-out text of `text_tokens`, evenly spread over its `occurrences`."""

    token: Token
    uses: tuple[WordUse, ...]
    occurrences: int
    text_tokens: int
    served: Served

    @classmethod
    def of(cls, m: pb.ListUsesResponse) -> WordUses:
        uses = tuple(map(WordUse.of, m.uses))
        return cls(Token.of(m.token), uses, m.occurrences, m.text_tokens, Served.of(m.served))


def _scored_tokens(some: Iterable[pb.ScoredToken]) -> tuple[tuple[Token, float], ...]:
    return tuple((Token.of(each.token), each.score) for each in some)
