"""What a client gets back.

T is the number of a text's tokens, k that of a model's senses. Logarithms are natural.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from backpack_lm.generation import UNTRUNCATED, SamplingDefaults
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.references import Position

FINISH = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Served:
    """What an answer was made with. Release 0 is the model unpatched; `digest` is the release's, in hex.

    `at` is where the store stood: given as another call's `since`, that call isn't answered with less.
    `staleness` is how many seconds old the gateway's knowledge was; answers may be equal all the same. `draft` is the
    digest that the draft's edits have as a revision, "" without a draft; with one, `digest` is of both together.
    """

    tenant: str
    channel: str
    release: int
    digest: str
    canary: bool
    model: str
    at: Position
    staleness: float = field(compare=False)
    draft: str = ""

    @classmethod
    def of(cls, m: pb.Served) -> Served:
        return cls(
            m.tenant,
            m.channel,
            m.release,
            m.release_digest,
            m.canary,
            m.model_fingerprint,
            Position(m.epoch, m.revision),
            m.staleness.ToNanoseconds() / 1e9,
            m.draft_digest,
        )


@dataclass(frozen=True, slots=True)
class Token:
    """A token; its log-probability, if that is known.

    A generated one has the likeliest others and what made it likely, if the request asked for them.
    """

    id: int
    text: str
    log_probability: float | None = None
    alternatives: tuple[Token, ...] = ()
    explanation: Explanation | None = None

    @classmethod
    def of(cls, m: pb.Token) -> Token:
        known = m.log_probability if m.HasField("log_probability") else None
        why = Explanation.of(m.explanation) if m.HasField("explanation") else None
        return cls(m.id, m.text, known, tokens(m.alternatives), why)


def tokens(messages: Iterable[pb.Token]) -> tuple[Token, ...]:
    return tuple(map(Token.of, messages))


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a stream: of one of its samples, which come mixed.

    Each sample's first has `served`, its last has `finish` ("stop" or "length"). The stream's last has the counts,
    of all samples together. `text` is what became final; it never ends within a character. The stream's first has the
    `prompt`, if its log-probabilities were asked for.
    """

    text: str
    tokens: tuple[Token, ...]
    sample: int = 0
    served: Served | None = None
    finish: str | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prompt: tuple[Token, ...] = ()

    @classmethod
    def of(cls, m: pb.GenerateStreamResponse) -> Part:
        served = Served.of(m.served) if m.HasField("served") else None
        usage = m.usage
        return cls(
            m.text,
            tokens(m.tokens),
            m.sample,
            served,
            FINISH.get(m.finish_reason),
            usage.prompt_tokens,
            usage.generated_tokens,
            tokens(m.prompt),
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """A text after a prompt. `finish` is "stop" (end of text, or a stop string) or "length"."""

    text: str
    tokens: tuple[Token, ...]
    finish: str

    @classmethod
    def of(cls, m: pb.Sample | pb.GenerateResponse) -> Sample:
        return cls(m.text, tokens(m.tokens), FINISH[m.finish_reason])


@dataclass(frozen=True, slots=True)
class Generation:
    """As many texts after a prompt as were asked for; `text`, `tokens` and `finish` are the first one's.

    `generated_tokens` are those of all samples together. `prompt` are its tokens, if their log-probabilities were asked
    for; the first has none.
    """

    samples: tuple[Sample, ...]
    prompt_tokens: int
    generated_tokens: int
    served: Served
    prompt: tuple[Token, ...] = ()

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def tokens(self) -> tuple[Token, ...]:
        return self.samples[0].tokens

    @property
    def finish(self) -> str:
        return self.samples[0].finish

    @classmethod
    def of(cls, m: pb.GenerateResponse) -> Generation:
        usage = m.usage
        samples = (Sample.of(m), *map(Sample.of, m.more_samples))
        return cls(samples, usage.prompt_tokens, usage.generated_tokens, Served.of(m.served), tokens(m.prompt))


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a text is: T tokens, all but the first with a log-probability; their sum, and the perplexity.

    The perplexity is exp(−sum / (T − 1)).
    """

    tokens: tuple[Token, ...]
    log_probability: float
    perplexity: float
    served: Served

    @classmethod
    def of(cls, m: pb.ScoreResponse) -> Score:
        return cls(tokens(m.tokens), m.log_probability, m.perplexity, Served.of(m.served))

    @classmethod
    def compared(cls, m: pb.CompareResponse) -> tuple[Score, ...]:
        """One for each release."""
        text = tokens(m.tokens)
        return tuple(
            cls(
                (text[0], *map(_with_log, text[1:], r.score.log_probabilities)),
                r.score.log_probability,
                r.score.perplexity,
                Served.of(r.served),
            )
            for r in m.releases
        )


def _with_log(token: Token, log_probability: float) -> Token:
    return Token(token.id, token.text, log_probability)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What follows a prompt under a release: the likeliest tokens, most likely first, and the targets.

    All have log-probabilities: under temperature 1 and the whole vocabulary.
    """

    top: tuple[Token, ...]
    targets: tuple[Token, ...]
    served: Served

    @classmethod
    def compared(cls, m: pb.CompareResponse) -> tuple[Prediction, ...]:
        """One for each release."""
        return tuple(cls(tokens(r.next.top), tokens(r.next.targets), Served.of(r.served)) for r in m.releases)


@dataclass(frozen=True, slots=True)
class Contribution:
    """One term of a logit: what sense `sense` of the token at `position` (both from 0) adds to it.

    `contribution` = `weight` · `multiplier` · E[target] · C(token)_sense, where `weight` is α, which no release
    changes, and `multiplier` is that of the release's topics.
    """

    position: int
    token: Token
    sense: int
    weight: float
    multiplier: float
    contribution: float

    @classmethod
    def of(cls, m: pb.Contribution) -> Contribution:
        return cls(m.position, Token.of(m.token), m.sense, m.weight, m.multiplier, m.contribution)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What made a token likely: its logit is the sum of the contributions, of `unlisted` and of `bias`.

    Of T · k contributions the largest are listed, largest magnitude first; `unlisted` is the sum of the others.
    `bias` is what the release's bias edits add, 0 without any: −∞, as is the logit, for a word that is forbidden.
    """

    logit: float
    contributions: tuple[Contribution, ...]
    unlisted: float
    bias: float

    @classmethod
    def of(cls, m: pb.Explanation | pb.ExplainResponse) -> Explanation:
        return cls(m.logit, tuple(map(Contribution.of, m.contributions)), m.unlisted, m.bias)


@dataclass(frozen=True, slots=True)
class Explained(Explanation):
    """Why `target` follows a prompt, and with which log-probability."""

    target: Token
    served: Served

    @classmethod
    def answer(cls, m: pb.ExplainResponse) -> Explained:
        why = Explanation.of(m)
        return cls(why.logit, why.contributions, why.unlisted, why.bias, Token.of(m.target), Served.of(m.served))


@dataclass(frozen=True, slots=True)
class Moved:
    """A word, and its mean probability as the next one over a text, unpatched and under a release."""

    token: Token
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a release does to text that it should leave alone.

    Perplexities are of `tokens` predictions of text that lies beside the model, unpatched and under the release.
    `moved` are the words whose probability moves most; `cells` how many the release replaces, `topics` how many it has,
    `biased` how many tokens have a bias.
    """

    before: float
    after: float
    tokens: int
    moved: tuple[Moved, ...]
    cells: int
    topics: int
    biased: int
    served: Served

    @property
    def change(self) -> float:
        """Of the perplexity, as a share of it: 0.05 is 5 % more."""
        return self.after / self.before - 1

    @classmethod
    def of(cls, m: pb.JudgeResponse) -> Judgement:
        moved = tuple(Moved(Token.of(word.token), word.before, word.after) for word in m.moved)
        before, after = m.perplexity_before, m.perplexity_after
        return cls(before, after, m.tokens, moved, m.cells, m.topics, m.biased, Served.of(m.served))


@dataclass(frozen=True, slots=True)
class Sense:
    """One sense of a word: tokens whose logits it raises and lowers most, each with E[token] · C(word)_sense.

    `norm` is |C(word)_sense|; `edited`: the release replaces it. `neighbours`, if asked for, are words whose same
    sense points most nearly the same way, each with the cosine.
    """

    number: int
    norm: float
    edited: bool
    raises: tuple[tuple[Token, float], ...]
    lowers: tuple[tuple[Token, float], ...]
    neighbours: tuple[tuple[Token, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Senses:
    """All k senses of a word, and its token."""

    token: Token
    senses: tuple[Sense, ...]
    served: Served

    @classmethod
    def of(cls, m: pb.ListSensesResponse) -> Senses:
        def scored(some: Iterable[pb.ScoredToken]) -> tuple[tuple[Token, float], ...]:
            return tuple((Token.of(s.token), s.score) for s in some)

        found = (
            Sense(s.sense, s.norm, s.edited, scored(s.positive), scored(s.negative), scored(s.neighbours))
            for s in m.senses
        )
        return cls(Token.of(m.token), tuple(found), Served.of(m.served))


@dataclass(frozen=True, slots=True)
class FoundSense:
    """A sense that raises or lowers the words of a search: `score` is E[word] · C(token)_sense, the mean over
    them, less the same of the words that they are set against.

    `frequency` is how often the token occurs in a million tokens of text, None for a model without counts; `edited`:
    the release changes the sense. With prompts, `contribution` is what it adds in all of them, and `prompts` counts
    those in which it has the effect.
    """

    token: Token
    sense: int
    score: float
    frequency: float | None
    edited: bool
    contribution: float | None = None
    prompts: int = 0

    @classmethod
    def of(cls, m: pb.FoundSense) -> FoundSense:
        frequency = m.frequency if m.HasField("frequency") else None
        contribution = m.contribution if m.HasField("contribution") else None
        return cls(Token.of(m.token), m.sense, m.score, frequency, m.edited, contribution, m.prompts)


@dataclass(frozen=True, slots=True)
class FoundSenses:
    """What a search has found, the sense with most of the effect first; the tokens that its words are."""

    senses: tuple[FoundSense, ...]
    words: tuple[Token, ...]
    against: tuple[Token, ...]
    served: Served

    @classmethod
    def of(cls, pages: Sequence[pb.FindSensesResponse]) -> FoundSenses:
        """Of one page or more."""
        found = tuple(FoundSense.of(each) for page in pages for each in page.senses)
        first = pages[0]
        return cls(found, tokens(first.words), tokens(first.against), Served.of(first.served))


@dataclass(frozen=True, slots=True)
class Model:
    """The model that a gateway serves: sizes in tokens, senses of a word, dimensions, layers of the trunk.

    `defaults` is how tokens are drawn of a request that doesn't say.
    """

    fingerprint: str
    vocabulary: int
    context: int
    senses: int
    width: int
    layers: int
    defaults: SamplingDefaults

    @classmethod
    def of(cls, m: pb.GetModelResponse) -> Model:
        defaults, given = UNTRUNCATED, m.sampling_defaults  # those of a gateway that is older than the message
        if m.HasField("sampling_defaults"):
            penalty = given.repetition_penalty or UNTRUNCATED.repetition_penalty
            defaults = SamplingDefaults(given.temperature, given.top_k, given.top_p, given.min_p, penalty)
        return cls(m.fingerprint, m.vocab_size, m.context_size, m.num_senses, m.width, m.num_layers, defaults)
