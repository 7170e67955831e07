"""What only a replica reads and writes: the gateway's pin, and answers about a text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from backpack_lm.attribution import SenseReading, Term
from backpack_lm.compare import Distribution
from backpack_lm.manifest import Manifest
from backpack_lm.ordinary_text import MovedWord
from backpack_lm.patch import ModelShape, RevisionContent
from backpack_lm.sense_map import MapReading
from backpack_lm.sense_search import RankedCell
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.word_uses import UseReading
from backpack_proto.v1 import inference_pb2 as pb
from google.protobuf.message import DecodeError

from backpack_serving import rpc
from backpack_serving.errors import Internal, InvalidRequest, PreconditionFailed
from backpack_serving.inference.served_model import Ranked
from backpack_serving.wire.drafts import read_draft
from backpack_serving.wire.inference import PIN, write_token


def read_pin(context: rpc.Context) -> pb.Pin:
    """What the gateway decided. Raises PreconditionFailed for a caller that is no gateway, InvalidRequest for what
    is no pin.
    """
    packed = rpc.metadata(context).get(PIN)
    if not isinstance(packed, bytes):
        raise PreconditionFailed("NO_PIN", "this is a replica; call the gateway")
    try:
        return check_pin(pb.Pin.FromString(packed))
    except DecodeError as error:
        raise InvalidRequest("NOT_A_MESSAGE", f"{PIN}: {error}") from None


def check_pin(pin: pb.Pin) -> pb.Pin:
    """Raises InvalidRequest for what can't be a digest: a replica's files are called by it."""
    if not re.fullmatch("[0-9a-f]{64}", pin.release_digest):
        raise InvalidRequest.at("pin.release_digest", "BAD_DIGEST", f"{pin.release_digest!r} is no SHA-256 in hex")
    return pin


def read_drafts(
    pins: Sequence[pb.Pin], messages: Sequence[Any], tokenizer: Tokenizer, shape: ModelShape
) -> list[RevisionContent | None]:
    """The draft of each message, as the gateway read it for its pin; blocks. Raises InvalidRequest."""
    found: list[RevisionContent | None] = []
    for pin, message in zip(pins, messages, strict=True):
        draft = read_draft("draft", message.draft, tokenizer, shape) if message.HasField("draft") else None
        if pin.draft_digest != (draft.digest if draft else ""):
            raise Internal("WRONG_DRAFT", f"pinned draft {pin.draft_digest!r}, the request has another")
        found.append(draft)
    return found


def read_pins(request: pb.CompareRequest) -> list[pb.Pin]:
    """What the gateway decided. Raises PreconditionFailed for a caller that is no gateway, and as `check_pin`."""
    if len(request.pins) != len(request.releases) or not request.pins:
        raise PreconditionFailed("NO_PIN", "this is a replica; call the gateway")
    return list(map(check_pin, request.pins))


def served(pin: pb.Pin, digest: str, manifest: Manifest) -> pb.Served:
    """What a response was made with; `digest` is the one that the engine read from the slot."""
    return pb.Served(
        tenant=pin.tenant,
        channel=pin.channel,
        release=pin.release,
        release_digest=digest,
        epoch=pin.epoch,
        revision=pin.revision,
        model_fingerprint=manifest.fingerprint,
        staleness=pin.staleness,
        canary=pin.canary,
        draft_digest=pin.draft_digest,
    )


def write_score(logs: Sequence[float]) -> pb.TextScore:
    return pb.TextScore(log_probabilities=logs, log_probability=math.fsum(logs), perplexity=perplexity(logs))


def perplexity(logs: Sequence[float]) -> float:
    """exp of the mean of −log p; infinite if that is more than a number can hold."""
    try:
        return math.exp(-math.fsum(logs) / len(logs))
    except OverflowError:
        return math.inf


def write_ranked(ids: Sequence[int], ranked: Ranked, tokenizer: Tokenizer) -> list[pb.Token]:
    """The tokens of a text; all but the first have their log p, and the likeliest in their place."""
    placed = zip(ids, [None, *ranked.logs], [[], *ranked.alternatives], strict=True)
    return [write_token(token, tokenizer, log, others) for token, log, others in placed]


def write_next(
    top: Sequence[tuple[int, float]], targets: Sequence[tuple[int, float]], tokenizer: Tokenizer
) -> pb.NextToken:
    return pb.NextToken(
        top=[write_token(token, tokenizer, value) for token, value in top],
        targets=[write_token(token, tokenizer, value) for token, value in targets],
    )


def write_compared(answer: list[float] | Distribution, tokenizer: Tokenizer) -> pb.ComparedRelease:
    """The answer of a comparison under one release: a score, or next tokens."""
    if isinstance(answer, list):
        return pb.ComparedRelease(score=write_score(answer))
    return pb.ComparedRelease(next=write_next(answer.top, answer.targets, tokenizer))


def write_contributions(terms: Sequence[Term], ids: Sequence[int], tokenizer: Tokenizer) -> list[pb.Contribution]:
    """Terms of a logit, with the tokens of `ids` that they come from."""
    return [
        pb.Contribution(
            position=term.position,
            token=write_token(ids[term.position], tokenizer),
            sense=term.sense,
            weight=term.weight,
            multiplier=term.multiplier,
            contribution=term.contribution,
        )
        for term in terms
    ]


def write_senses(senses: Sequence[SenseReading], tokenizer: Tokenizer) -> list[pb.Sense]:
    """All senses of a word, in their order."""
    return [
        pb.Sense(
            sense=number,
            norm=sense.norm,
            edited=sense.edited,
            positive=_write_scored(sense.positive, tokenizer),
            negative=_write_scored(sense.negative, tokenizer),
            neighbours=_write_scored(sense.neighbours, tokenizer),
        )
        for number, sense in enumerate(senses)
    ]


def _write_scored(some: Sequence[tuple[int, float]], tokenizer: Tokenizer) -> list[pb.ScoredToken]:
    return [pb.ScoredToken(token=write_token(token, tokenizer), score=value) for token, value in some]


def write_map(words: Sequence[int], found: MapReading, tokenizer: Tokenizer) -> pb.MapSenseResponse:
    """A map of a sense of these words, but for `served`."""
    rows = zip(words, found.points, found.norms, found.edited, strict=True)
    mapped = (
        pb.MappedWord(token=write_token(word, tokenizer), x=x, y=y, norm=norm, edited=edited)
        for word, (x, y), norm, edited in rows
    )
    x, y = (
        pb.MapAxis(
            share=axis.share,
            positive=_write_scored(axis.positive, tokenizer),
            negative=_write_scored(axis.negative, tokenizer),
        )
        for axis in found.axes
    )
    return pb.MapSenseResponse(words=mapped, x=x, y=y)


def write_use(use: UseReading, tokenizer: Tokenizer) -> pb.WordUse:
    before, after = ([write_token(token, tokenizer) for token in side] for side in (use.before, use.after))
    most = use.contributions.max(0)
    columns = (use.contributions.sum(0).tolist(), most.indices.tolist(), most.values.tolist())
    senses = (
        pb.UsedSense(contribution=total, strongest=at, most=value) for total, at, value in zip(*columns, strict=True)
    )
    return pb.WordUse(before=before, after=after, senses=senses)


def write_moved(words: Sequence[MovedWord], tokenizer: Tokenizer) -> list[pb.MovedWord]:
    return [
        pb.MovedWord(token=write_token(word.token, tokenizer), before=word.before, after=word.after) for word in words
    ]


def write_found(cells: Sequence[RankedCell], tokenizer: Tokenizer) -> list[pb.FoundSense]:
    """What a search has found, in its order."""
    return [
        pb.FoundSense(
            token=write_token(cell.token, tokenizer),
            sense=cell.sense,
            score=cell.score,
            contribution=cell.contribution,
            prompts=cell.prompts,
            frequency=cell.frequency,
            edited=cell.edited,
        )
        for cell in cells
    ]


def add_part(response: pb.GenerateResponse, part: pb.GenerateStreamResponse) -> None:
    """Append a part of a stream to the answer of a call without one."""
    while part.sample > len(response.more_samples):
        response.more_samples.add()
    sample: pb.GenerateResponse | pb.Sample = response.more_samples[part.sample - 1] if part.sample else response
    sample.text += part.text
    sample.tokens.extend(part.tokens)
    sample.finish_reason = part.finish_reason
    response.prompt.extend(part.prompt)
    if part.HasField("served"):
        response.served.CopyFrom(part.served)
    if part.HasField("usage"):
        response.usage.CopyFrom(part.usage)
