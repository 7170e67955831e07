"""Reads comparisons: the releases, and the query to evaluate under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backpack_lm.config import BackpackConfig
from backpack_lm.patch import Violation
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.errors import InvalidRequest
from backpack_serving.wire.edits import WordReader
from backpack_serving.wire.inference import read_prompt

MOST_RELEASES, MOST_DRAFTS, MOST_TOP, DEFAULT_TOP, MOST_TARGETS = 256, 16, 100, 10, 64


@dataclass(frozen=True, slots=True)
class ComparisonQuery:
    """A query to evaluate under each release: the text's score, or its `top` next tokens and `targets`."""

    ids: tuple[int, ...]
    score: bool
    top: int = 0
    targets: tuple[int, ...] = ()

    def tokens(self, releases: int) -> int:
        """The cost in tokens: the text once, and each prediction under each release."""
        return len(self.ids) + releases * (len(self.ids) - 1 if self.score else 1)


def check_draft_count(request: pb.CompareRequest) -> None:
    """Raises InvalidRequest for too many drafts, before any is read."""
    if (tried := sum(choice.HasField("draft") for choice in request.releases)) > MOST_DRAFTS:
        raise InvalidRequest.at("releases", "TOO_MANY_DRAFTS", f"{tried} with a draft; at most {MOST_DRAFTS}")


def read_choices(request: pb.CompareRequest, drafts: Sequence[str]) -> tuple[int | str, ...]:
    """Read the releases, by number or channel; unpatched is number 0. Raises InvalidRequest.

    `drafts` are the digests of the drafts over them, "" for none: a release may be named again with other edits.
    """
    found: list[Violation] = []
    count = len(request.releases)
    if not 1 <= count <= MOST_RELEASES:
        raise InvalidRequest.at("releases", "OUT_OF_RANGE", f"{count} releases; 1 to {MOST_RELEASES}")
    choices: list[int | str] = []
    places: dict[tuple[int | str, str], int] = {}
    for at, (message, draft) in enumerate(zip(request.releases, drafts, strict=True)):
        field = f"releases[{at}]"
        match message.WhichOneof("release"):
            case "number" if message.number >= 0:
                choice: int | str = message.number
            case "number":
                text = f"{message.number}; 0 (unpatched) or more"
                found.append(Violation(f"{field}.number", "OUT_OF_RANGE", text))
                continue
            case "channel":
                choice = message.channel
            case "unpatched" if message.unpatched:
                choice = 0
            case _:
                found.append(Violation(field, "EMPTY", "names no release; give a number, a channel or unpatched"))
                continue
        if (first := places.setdefault((choice, draft), at)) != at:
            text = f"{choice!r} is releases[{first}] already; name each release once, and each draft of it"
            found.append(Violation(field, "DUPLICATE", text))
        choices.append(choice)
    if found:
        raise InvalidRequest.of(*found)
    return tuple(choices)


def read_comparison(request: pb.CompareRequest, tokenizer: Tokenizer, config: BackpackConfig) -> ComparisonQuery:
    """Read the query. Raises InvalidRequest for a bad prompt, else with all other violations."""
    ids = read_prompt("prompt", request.prompt, tokenizer, config)
    score = request.mode == pb.COMPARE_MODE_SCORE
    reader = WordReader(tokenizer, config.num_senses)
    if request.mode not in pb.CompareMode.values():
        reader.refuse("mode", "UNKNOWN_VALUE", f"{request.mode}; use {' or '.join(pb.CompareMode.keys()[1:])}")
    some = request.targets[:MOST_TARGETS]
    targets = tuple(reader.token(f"targets[{at}]", word) for at, word in enumerate(some))
    if score and len(ids) < 2:
        reader.refuse("prompt", "TOO_SHORT", "one token; a score needs at least two")
    if score and (request.top or targets):
        field, value = ("top", request.top) if request.top else ("targets", len(request.targets))
        reader.refuse(field, "NOT_IN_THIS_MODE", f"{value}, for mode NEXT_TOKEN; leave it out to score a text")
    if not 0 <= request.top <= MOST_TOP:
        reader.refuse("top", "OUT_OF_RANGE", f"{request.top}; 1 to {MOST_TOP}, or 0 for {DEFAULT_TOP}")
    if len(request.targets) > MOST_TARGETS:
        reader.refuse("targets", "TOO_MANY", f"{len(request.targets)}; at most {MOST_TARGETS}")
    if reader.violations:
        raise InvalidRequest.of(*reader.violations)
    return ComparisonQuery(ids, score, min(request.top or DEFAULT_TOP, config.tokens), targets)
