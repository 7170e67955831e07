"""What a client gets back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from backpack_proto.v1 import inference_pb2 as pb

FINISH = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Served:
    """What an answer was made with. Release 0 is the model unpatched; `digest` is the release's, in hex."""

    tenant: str
    channel: str
    release: int
    digest: str
    canary: bool
    model: str

    @classmethod
    def of(cls, m: pb.Served) -> Served:
        return cls(m.tenant, m.channel, m.release, m.release_digest, m.canary, m.model_fingerprint)


@dataclass(frozen=True, slots=True)
class Token:
    """A token; its natural log-probability, if that is known, and those of the likeliest others, if asked for."""

    id: int
    text: str
    log_probability: float | None = None
    alternatives: tuple[Token, ...] = ()

    @classmethod
    def of(cls, m: pb.Token) -> Token:
        known = m.log_probability if m.HasField("log_probability") else None
        return cls(m.id, m.text, known, tokens(m.alternatives))


def tokens(messages: Iterable[pb.Token]) -> tuple[Token, ...]:
    return tuple(map(Token.of, messages))


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a stream. The first has `served`; the last has `finish` ("stop" or "length") and the counts."""

    text: str
    tokens: tuple[Token, ...]
    served: Served | None = None
    finish: str | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0

    @classmethod
    def of(cls, m: pb.GenerateStreamResponse) -> Part:
        served = Served.of(m.served) if m.HasField("served") else None
        usage = m.usage
        return cls(
            m.text,
            tokens(m.tokens),
            served,
            FINISH.get(m.finish_reason),
            usage.prompt_tokens,
            usage.generated_tokens,
        )


@dataclass(frozen=True, slots=True)
class Generation:
    """A text after a prompt. `finish` is "stop" (end of text, or a stop string) or "length"."""

    text: str
    tokens: tuple[Token, ...]
    finish: str
    prompt_tokens: int
    generated_tokens: int
    served: Served

    @classmethod
    def of(cls, m: pb.GenerateResponse) -> Generation:
        usage = m.usage
        return cls(
            m.text,
            tokens(m.tokens),
            FINISH[m.finish_reason],
            usage.prompt_tokens,
            usage.generated_tokens,
            Served.of(m.served),
        )


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a text is: tokens, all but the first with a log-probability; their sum, and the perplexity."""

    tokens: tuple[Token, ...]
    log_probability: float
    perplexity: float
    served: Served

    @classmethod
    def of(cls, m: pb.ScoreResponse) -> Score:
        return cls(tokens(m.tokens), m.log_probability, m.perplexity, Served.of(m.served))


@dataclass(frozen=True, slots=True)
class Contribution:
    """One term of a logit: what sense `sense` of the token at `position` adds to it."""

    position: int
    token: Token
    sense: int
    weight: float
    multiplier: float
    contribution: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why `target` follows: its logit is the sum of the contributions and of what isn't listed."""

    target: Token
    logit: float
    contributions: tuple[Contribution, ...]
    unlisted: float
    served: Served

    @classmethod
    def of(cls, m: pb.ExplainResponse) -> Explanation:
        terms = tuple(
            Contribution(c.position, Token.of(c.token), c.sense, c.weight, c.multiplier, c.contribution)
            for c in m.contributions
        )
        return cls(Token.of(m.target), m.logit, terms, m.unlisted, Served.of(m.served))


@dataclass(frozen=True, slots=True)
class Sense:
    """One sense of a word: tokens that it raises and lowers most, each with how much."""

    number: int
    norm: float
    edited: bool
    raises: tuple[tuple[Token, float], ...]
    lowers: tuple[tuple[Token, float], ...]


@dataclass(frozen=True, slots=True)
class Senses:
    """All senses of a word."""

    token: Token
    senses: tuple[Sense, ...]
    served: Served

    @classmethod
    def of(cls, m: pb.ListSensesResponse) -> Senses:
        def scored(some: Iterable[pb.ScoredToken]) -> tuple[tuple[Token, float], ...]:
            return tuple((Token.of(s.token), s.score) for s in some)

        found = (Sense(s.sense, s.norm, s.edited, scored(s.positive), scored(s.negative)) for s in m.senses)
        return cls(Token.of(m.token), tuple(found), Served.of(m.served))


@dataclass(frozen=True, slots=True)
class Model:
    """The model that a gateway serves."""

    fingerprint: str
    vocabulary: int
    context: int
    senses: int
    width: int
    layers: int

    @classmethod
    def of(cls, m: pb.GetModelResponse) -> Model:
        return cls(m.fingerprint, m.vocab_size, m.context_size, m.num_senses, m.width, m.num_layers)
