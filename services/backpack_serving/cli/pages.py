"""Pages of a word and of a generation, from what a server answers: files that open without one."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable
from pathlib import Path

from backpack_lm.reports.generation import GenerationPage, Step, Term
from backpack_lm.reports.word import SensePage, WordPage
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.cli.client import Client
from backpack_serving.cli.experiment import Shown
from backpack_serving.errors import Conflict

TERMS = 1000  # as many as an answer may list; the rest is summed up


def write_word(word: str, answer: pb.ListSensesResponse, file: Path) -> None:
    """The page of a word's senses."""

    def scored(some: Iterable[pb.ScoredToken]) -> tuple[tuple[str, float], ...]:
        return tuple((one.token.text.strip() or repr(one.token.text), one.score) for one in some)

    senses = tuple(
        SensePage(s.norm, s.edited, scored(s.positive), scored(s.negative), scored(s.neighbours))
        for s in answer.senses
    )
    file.write_text(WordPage(word, senses, _made_by(answer.served)).html(), "utf-8")


def write_generation(
    client: Client, prompt: str, channel: str, sampling: pb.Sampling, file: Path
) -> pb.GenerateResponse:
    """Generate, then ask for the terms of every token that was made; the page of both.

    Raises Conflict if another release was activated in between: a token is explained by what made it.
    """
    stub, metadata = client.inference, client.metadata
    before = stub.Tokenize(pb.TokenizeRequest(text=prompt), metadata=metadata).tokens
    one = uuid.uuid4().hex  # during a canary, the same key is served by the same release
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text=prompt), channel=channel, sampling=sampling, request_key=one
    )
    made: pb.GenerateResponse = stub.Generate(request, metadata=metadata)
    ids, steps = [token.id for token in before], []
    with Shown() as watch:
        for token in watch(made.tokens, "explaining", len(made.tokens)):
            asked = pb.ExplainRequest(
                prompt=pb.Prompt(tokens=pb.TokenIds(ids=ids)),
                target=pb.Word(token=token.id),
                limit=TERMS,
                channel=channel,
                request_key=one,
            )
            answer = stub.Explain(asked, metadata=metadata)
            if answer.served.release_digest != made.served.release_digest:
                raise Conflict(
                    "RELEASE_CHANGED",
                    f"{channel} moved to another release while the text was explained; try again",
                )
            steps.append(_step(token.text, answer))
            ids.append(token.id)
    senses = stub.GetModel(pb.GetModelRequest(), metadata=metadata).num_senses
    words = tuple(token.text for token in before)
    file.write_text(GenerationPage(words, tuple(steps), senses, _made_by(made.served)).html(), "utf-8")
    return made


def _step(token: str, answer: pb.ExplainResponse) -> Step:
    terms = tuple(Term(c.position, c.sense, c.weight, c.multiplier, c.contribution) for c in answer.contributions)
    return Step(token, math.exp(answer.target.log_probability), answer.logit, answer.unlisted, terms)


def _made_by(served: pb.Served) -> str:
    return (
        f"Model {served.model_fingerprint[:12]}, {served.tenant}/{served.channel}, release {served.release} "
        f"({served.release_digest[:12]})."
    )
