"""Generation requests and answers ↔ messages, shared by gateway and replica."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from backpack_lm import strict_json
from backpack_lm.config import BackpackConfig
from backpack_lm.generation import UNTRUNCATED, SamplingDefaults
from backpack_lm.manifest import Manifest
from backpack_lm.patch import Violation
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.errors import InvalidRequest
from backpack_serving.sampling import SamplingParams, TextStructure
from backpack_serving.wire.edits import WordReader

PIN = "backpack-pin-bin"
"""Metadata of a gateway's call to a replica: a serialized Pin."""

DEFAULT_TOKENS = 64
LARGEST_STOP, MOST_STOPS, MOST_ALTERNATIVES, MOST_SAMPLES = 256, 16, 20, 16
MOST_BIASES, MOST_BIAS, MOST_PENALTY, MOST_REPETITION_PENALTY, MOST_BAD_WORDS = 1024, 100, 2, 100, 64
LARGEST_STRUCTURE = 65_536
"""Bytes of a JSON schema, a regular expression or a grammar."""

HIGHEST_PRIORITY = 100
DEFAULT_EXPLAINED, MOST_EXPLAINED, MOST_IN_ONE_ANSWER = 8, 64, 40_000
COALESCE, LONGEST_COALESCE = 0.03, 1.0
GREEDY_BELOW = 1e-6
"""Lower temperatures are read as 0 (greedy): dividing logits by much less overflows float32."""

HOTTEST = 1e30
"""Higher temperatures are read as this one, which is uniform already: much more overflows float32."""

Generation = pb.GenerateRequest | pb.GenerateStreamRequest


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """A validated generation request: prompt ids, sampling, and how many contributions explain each token.

    `alternatives` are to be listed with each log-probability of the prompt; None: those aren't asked for.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    samples: int
    priority: int
    explain: int | None = None
    alternatives: int | None = None

    @property
    def read_again(self) -> int:
        """Prompt tokens that are read once more, for their log-probabilities."""
        return 0 if self.alternatives is None else len(self.prompt)

    @property
    def new(self) -> int:
        """Most tokens that are made, of all samples."""
        return self.samples * self.sampling.max_tokens

    @property
    def tokens(self) -> int:
        """Upper bound of the cost: prompt tokens and new tokens of all samples."""
        return len(self.prompt) + self.read_again + self.new

    def sample(self, number: int) -> SamplingParams:
        """The sampling parameters of one sample: the seed plus its number."""
        assert self.sampling.seed is not None, "read_generation draws one"
        return replace(self.sampling, seed=(self.sampling.seed + number) % 2**64)


def read_generation(
    request: Generation, tokenizer: Tokenizer, config: BackpackConfig, defaults: SamplingDefaults
) -> GenerationParams:
    """Validate a request; `defaults` are the model's.

    Raises InvalidRequest for a bad prompt, else with all other violations.
    """
    found: list[Violation] = []
    prompt = read_prompt("prompt", request.prompt, tokenizer, config)
    if abs(request.priority) > HIGHEST_PRIORITY:
        span = f"{-HIGHEST_PRIORITY} to {HIGHEST_PRIORITY}"
        found.append(Violation("priority", "OUT_OF_RANGE", f"{request.priority}; {span}"))
    room = config.n_positions - len(prompt)
    max_tokens = request.sampling.max_tokens or min(DEFAULT_TOKENS, room)
    found += _sampling_violations(request.sampling, max(max_tokens, 0), config)
    if max_tokens > room or room < 1:
        text = f"{len(prompt)} prompt tokens and {max(max_tokens, 1)} new ones; together at most {config.n_positions}"
        found.append(Violation("sampling.max_tokens" if room > 0 else "prompt", "TOO_LONG", text))
    explain = None
    if request.HasField("explain"):
        explain = request.explain.limit or DEFAULT_EXPLAINED
        if not 0 < explain <= MOST_EXPLAINED:
            span = f"1 to {MOST_EXPLAINED}, or 0 for {DEFAULT_EXPLAINED}"
            found.append(Violation("explain.limit", "OUT_OF_RANGE", f"{explain}; {span}"))
        size = explain * max_tokens * (request.sampling.samples or 1)
        if isinstance(request, pb.GenerateRequest) and size > MOST_IN_ONE_ANSWER:
            text = f"{size} contributions, at most {MOST_IN_ONE_ANSWER} in one answer; list fewer, or stream"
            found.append(Violation("explain.limit", "TOO_LARGE", text))
    if found:
        raise InvalidRequest.of(*found)
    s = request.sampling
    drawn = _read_sampling_defaults(s, defaults)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=min(drawn.temperature, HOTTEST) if drawn.temperature >= GREEDY_BELOW else 0.0,
        top_k=drawn.top_k,
        top_p=drawn.top_p,
        seed=s.seed if s.HasField("seed") else secrets.randbits(64),
        stop=tuple(s.stop),
        log_probabilities=s.log_probabilities if s.HasField("log_probabilities") else None,
        ignore_end_of_text=s.ignore_end_of_text,
        logit_bias=tuple(sorted(s.logit_bias.items())),
        min_p=drawn.min_p,
        repetition_penalty=drawn.repetition_penalty,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        min_tokens=s.min_tokens,
        bad_words=tuple(_spellings(s.bad_words, tokenizer)),
        structure=_read_structure(s),
    )
    alternatives = s.prompt_log_probabilities if s.HasField("prompt_log_probabilities") else None
    return GenerationParams(prompt, sampling, s.samples or 1, request.priority, explain, alternatives)


def _read_sampling_defaults(s: pb.Sampling, defaults: SamplingDefaults) -> SamplingDefaults:
    """The request's, if it sets any of them, else the model's defaults."""
    set_fields = {field.name for field, _ in s.ListFields()}
    given: dict[str, float] = {name: getattr(s, name) for name in _OPTIONAL if name in set_fields}
    return replace(UNTRUNCATED, top_k=s.top_k, **given) if given or s.top_k else defaults


_OPTIONAL = ("temperature", "top_p", "min_p", "repetition_penalty")


def _spellings(words: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """Token ids of words, without and with a space before them: other spellings of a word are other words."""
    for word in words:
        yield tuple(tokenizer.encode(word.strip()))
        yield tuple(tokenizer.encode(f" {word.strip()}"))


def _read_structure(s: pb.Sampling) -> TextStructure | None:
    form = s.WhichOneof("structure")
    return TextStructure(form, getattr(s, form)) if form else None


def normalize_request(request: Generation, params: GenerationParams) -> None:
    """Write token ids, max_tokens, seed and what may be the model's defaults into a request.

    Every replica then sees the same parameters, so a retry draws the same tokens.
    """
    request.prompt.tokens.ids[:] = params.prompt
    sampling, decided = request.sampling, params.sampling
    sampling.max_tokens = decided.max_tokens
    sampling.temperature, sampling.top_k, sampling.top_p = decided.temperature, decided.top_k, decided.top_p
    sampling.min_p, sampling.repetition_penalty = decided.min_p, decided.repetition_penalty
    assert decided.seed is not None, "read_generation draws one"
    sampling.seed = decided.seed


def read_prompt(field: str, prompt: pb.Prompt, tokenizer: Tokenizer, config: BackpackConfig) -> tuple[int, ...]:
    """Token ids of a prompt that fits the context. Raises InvalidRequest."""
    form = prompt.WhichOneof("form")
    ids = tuple(prompt.tokens.ids) if form == "tokens" else _encode(field, prompt.text, tokenizer, config)
    if not ids or form is None:
        raise InvalidRequest.at(field, "EMPTY", "no token; give a text or token ids")
    if len(ids) > config.n_positions:
        raise InvalidRequest.at(field, "TOO_LONG", f"{len(ids)} tokens; the context holds {config.n_positions}")
    for at, token in enumerate(ids):
        if token >= config.tokens:
            raise InvalidRequest.at(
                f"{field}.tokens.ids[{at}]", "UNKNOWN_TOKEN", f"{token}; this model's are 0 to {config.tokens - 1}"
            )
    return ids


def _encode(field: str, text: str, tokenizer: Tokenizer, config: BackpackConfig) -> tuple[int, ...]:
    """Encode a text. Raises InvalidRequest, before encoding, if it is longer than a context of longest tokens."""
    size, most = len(text.encode()), config.n_positions * tokenizer.longest
    if size > most:
        limit = f"the context's {config.n_positions} tokens hold at most {most}"
        raise InvalidRequest.at(field, "TOO_LONG", f"{size} bytes of text; {limit}")
    return tuple(tokenizer.encode_prompt(text))


def tokenize(request: pb.TokenizeRequest, tokenizer: Tokenizer, config: BackpackConfig) -> pb.TokenizeResponse:
    """Encode a text; blocks. Raises InvalidRequest."""
    ids = _encode("text", request.text, tokenizer, config)
    return pb.TokenizeResponse(tokens=[write_token(i, tokenizer) for i in ids])


def read_word(field: str, word: pb.Word, tokenizer: Tokenizer, config: BackpackConfig) -> int:
    """The one token of a word. Raises InvalidRequest."""
    reader = WordReader(tokenizer, config.num_senses)
    token = reader.token(field, word)
    if reader.violations:
        raise InvalidRequest.of(*reader.violations)
    return token


def read_limit(limit: int, default: int, largest: int, field: str = "limit") -> int:
    """The number of results to list. Raises InvalidRequest."""
    if not 0 <= limit <= largest:
        raise InvalidRequest.at(field, "OUT_OF_RANGE", f"{limit}; 1 to {largest}, or 0 for {default}")
    return limit or default


def read_alternatives(request: pb.ScoreRequest) -> int:
    """How many alternatives to list with each token of a score. Raises InvalidRequest."""
    if not 0 <= request.alternatives <= MOST_ALTERNATIVES:
        raise InvalidRequest.at("alternatives", "OUT_OF_RANGE", f"{request.alternatives}; 0 to {MOST_ALTERNATIVES}")
    return request.alternatives


def read_coalesce(request: pb.GenerateStreamRequest) -> float:
    """Seconds of tokens to batch into one message. Raises InvalidRequest."""
    if not request.HasField("coalesce"):
        return COALESCE
    seconds = request.coalesce.ToNanoseconds() / 1e9
    if not 0 <= seconds <= LONGEST_COALESCE:
        raise InvalidRequest.at("coalesce", "OUT_OF_RANGE", f"{seconds:g} s; 0 to {LONGEST_COALESCE:g} s")
    return seconds


def _sampling_violations(s: pb.Sampling, max_tokens: int, config: BackpackConfig) -> Iterator[Violation]:
    if s.max_tokens < 0:
        yield Violation("sampling.max_tokens", "OUT_OF_RANGE", f"{s.max_tokens}; at least 1")
    if not (math.isfinite(s.temperature) and s.temperature >= 0):
        yield Violation("sampling.temperature", "OUT_OF_RANGE", f"{s.temperature}; 0 (greedy) or more")
    if s.top_k < 0:
        yield Violation("sampling.top_k", "OUT_OF_RANGE", f"{s.top_k}; 0 (all) or more")
    if s.HasField("top_p") and not 0 < s.top_p <= 1:
        yield Violation("sampling.top_p", "OUT_OF_RANGE", f"{s.top_p}; above 0, at most 1")
    for name in ("log_probabilities", "prompt_log_probabilities"):
        if not 0 <= (count := getattr(s, name)) <= MOST_ALTERNATIVES:
            yield Violation(f"sampling.{name}", "OUT_OF_RANGE", f"{count}; 0 to {MOST_ALTERNATIVES}")
    if not 0 <= s.samples <= MOST_SAMPLES:
        yield Violation("sampling.samples", "OUT_OF_RANGE", f"{s.samples}; 1 to {MOST_SAMPLES}, or 0 for 1")
    if len(s.stop) > MOST_STOPS:
        yield Violation("sampling.stop", "TOO_MANY", f"{len(s.stop)}; at most {MOST_STOPS}")
    for at, stop in enumerate(s.stop[:MOST_STOPS]):
        if not 0 < len(stop) <= LARGEST_STOP:
            yield Violation(f"sampling.stop[{at}]", "OUT_OF_RANGE", f"{len(stop)} characters; 1 to {LARGEST_STOP}")
    if s.HasField("min_p") and not 0 <= s.min_p <= 1:
        yield Violation("sampling.min_p", "OUT_OF_RANGE", f"{s.min_p}; 0 (all) to 1")
    if s.HasField("repetition_penalty") and not 0 < s.repetition_penalty <= MOST_REPETITION_PENALTY:
        span = f"above 0, at most {MOST_REPETITION_PENALTY}; 1 for none"
        yield Violation("sampling.repetition_penalty", "OUT_OF_RANGE", f"{s.repetition_penalty}; {span}")
    for name in ("frequency_penalty", "presence_penalty"):
        if not abs(value := getattr(s, name)) <= MOST_PENALTY:
            yield Violation(f"sampling.{name}", "OUT_OF_RANGE", f"{value}; {-MOST_PENALTY} to {MOST_PENALTY}")
    if not 0 <= s.min_tokens <= max_tokens:
        yield Violation(
            "sampling.min_tokens", "OUT_OF_RANGE", f"{s.min_tokens}; 0 to {max_tokens}, which is max_tokens"
        )
    if len(s.logit_bias) > MOST_BIASES:
        yield Violation("sampling.logit_bias", "TOO_MANY", f"{len(s.logit_bias)}; at most {MOST_BIASES}")
    for token, bias in list(s.logit_bias.items())[:MOST_BIASES]:
        if token >= config.tokens:
            text = f"{token}; this model's are 0 to {config.tokens - 1}"
            yield Violation(f"sampling.logit_bias[{token}]", "UNKNOWN_TOKEN", text)
        elif not abs(bias) <= MOST_BIAS:
            yield Violation(f"sampling.logit_bias[{token}]", "OUT_OF_RANGE", f"{bias}; {-MOST_BIAS} to {MOST_BIAS}")
    if len(s.bad_words) > MOST_BAD_WORDS:
        yield Violation("sampling.bad_words", "TOO_MANY", f"{len(s.bad_words)}; at most {MOST_BAD_WORDS}")
    for at, word in enumerate(s.bad_words[:MOST_BAD_WORDS]):
        if not 0 < (size := len(word.strip())) <= LARGEST_STOP:
            text = f"{size} characters without the spaces around it; 1 to {LARGEST_STOP}"
            yield Violation(f"sampling.bad_words[{at}]", "OUT_OF_RANGE", text)
    if structure := _read_structure(s):
        yield from _structure_violations(structure, s.ignore_end_of_text)


def _structure_violations(structure: TextStructure, ignore_end_of_text: bool) -> Iterator[Violation]:
    """What can be told without the library that compiles it."""
    field, size = f"sampling.{structure.form}", len(structure.text.encode())
    if not 0 < size <= LARGEST_STRUCTURE:
        yield Violation(field, "OUT_OF_RANGE", f"{size} bytes; 1 to {LARGEST_STRUCTURE}")
        return
    if ignore_end_of_text:
        text = f"{structure.form} says where the text ends; leave one of them out"
        yield Violation("sampling.ignore_end_of_text", "NOT_IN_THIS_MODE", text)
    if structure.form == "json_schema":
        try:
            schema = strict_json.parse(structure.text)
        except strict_json.JsonError as error:
            yield Violation(field, "NOT_JSON", f"it is no JSON that can be read: {error}")
        else:
            if not isinstance(schema, dict):
                yield Violation(field, "BAD_GRAMMAR", f"{structure.text[:60]}; it must be a JSON object")


# ---- answers


def write_token(
    token: int,
    tokenizer: Tokenizer,
    log_probability: float | None = None,
    alternatives: Sequence[tuple[int, float]] = (),
) -> pb.Token:
    return pb.Token(
        id=token,
        text=tokenizer.piece(token),
        log_probability=log_probability,
        alternatives=[write_token(other, tokenizer, value) for other, value in alternatives],
    )


def write_model(manifest: Manifest) -> pb.GetModelResponse:
    config, defaults = manifest.config, manifest.defaults
    return pb.GetModelResponse(
        fingerprint=manifest.fingerprint,
        vocab_size=config.tokens,
        context_size=config.n_positions,
        num_senses=config.num_senses,
        width=config.n_embd,
        num_layers=config.trunk.depth,
        sampling_defaults=pb.SamplingDefaults(
            temperature=defaults.temperature,
            top_k=defaults.top_k,
            top_p=defaults.top_p,
            min_p=defaults.min_p,
            repetition_penalty=defaults.repetition_penalty,
        ),
    )
