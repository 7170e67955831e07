"""Several samples of one prompt, and priorities, over the wire."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import torch
from backpack_lm.overlay import Overlay
from backpack_lm.patch import Edit, ReleaseContent, RevisionContent
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.wire.edits import read_edits

from tests.e2e.conftest import System, copy

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The story of the king and the"


def _request(samples: int, seed: int = 7, new: int = 16, priority: int = 0) -> pb.GenerateRequest:
    sampling = pb.Sampling(max_tokens=new, seed=seed, samples=samples, ignore_end_of_text=True)
    return pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), sampling=sampling, priority=priority)


async def test_sample_n_is_what_seed_plus_n_gives(system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    whole = await system.inference.Generate(_request(3), metadata=key)
    texts = [whole.text, *(sample.text for sample in whole.more_samples)]
    alone = [(await system.inference.Generate(_request(1, seed=7 + n), metadata=key)).text for n in range(3)]
    assert texts == alone
    assert len(set(texts)) == 3
    assert whole.usage.generated_tokens == 3 * 16
    assert whole.usage.prompt_tokens == len(PROMPT.split())
    finished = [whole.finish_reason, *(sample.finish_reason for sample in whole.more_samples)]
    assert finished == [pb.FINISH_REASON_LENGTH] * 3


async def test_a_stream_tells_samples_apart(system: System) -> None:
    key = await system.tenant()
    parts = await system.stream(key, PROMPT, max_tokens=16, seed=7, samples=2, ignore_end_of_text=True)
    whole = await system.inference.Generate(_request(2), metadata=key)
    texts = ["".join(part.text for part in parts if part.sample == n) for n in range(2)]
    assert texts == [whole.text, whole.more_samples[0].text]
    assert [part.HasField("usage") for part in parts] == [False] * (len(parts) - 1) + [True]
    assert {part.sample for part in parts if part.HasField("served")} == {0, 1}


async def test_a_dropped_call_frees_the_slots_of_all_its_samples(system: System, made: Counter[str]) -> None:
    key = await system.tenant()
    request = pb.GenerateStreamRequest(
        prompt=pb.Prompt(text=PROMPT),
        sampling=pb.Sampling(max_tokens=490, seed=1, samples=4, ignore_end_of_text=True),
    )
    call = system.inference.GenerateStream(request, metadata=key)
    await call.read()
    call.cancel()
    await asyncio.gather(*(system.stream(key, PROMPT, max_tokens=1) for _ in range(4)))
    assert len(made) == 8
    assert max(made.values()) < 480, "who came next waited until one had ended"


async def test_a_prompts_log_probabilities_come_with_the_text_and_change_nothing_of_it(
    system: System, served: ServedModel
) -> None:
    """Under a draft, beside others of the same prompt, whose prefix is reused, and alone."""
    key, ids = await system.tenant(copy("king", "ship")), served.tokenizer.encode_prompt(PROMPT)
    draft = pb.Draft(edits=[copy("story", "nurse")])
    plain, asked = _request(2), _request(2)
    asked.sampling.prompt_log_probabilities = 3
    for request in (plain, asked):
        request.draft.CopyFrom(draft)
    without, first = await asyncio.gather(*(system.inference.Generate(each, metadata=key) for each in (plain, asked)))
    again = await system.inference.Generate(asked, metadata=key)
    assert first.prompt == again.prompt
    for each in (first, again):
        assert [each.text, each.more_samples[0].text] == [without.text, without.more_samples[0].text]
        assert each.usage.prompt_tokens == len(ids)
    assert not without.prompt

    release = [RevisionContent(served.manifest.fingerprint, tuple(_edits(served, one))) for one in ("king", "story")]
    overlay = Overlay.compile(ReleaseContent(tuple(release)), served.table)
    logs = served.model(torch.tensor([ids]), overlay)[0].log_softmax(-1)
    assert [token.id for token in first.prompt] == ids
    assert not first.prompt[0].HasField("log_probability")
    for at, token in list(enumerate(first.prompt))[1:]:
        assert token.log_probability == pytest.approx(float(logs[at - 1, token.id]), abs=1e-4)
        top = logs[at - 1].topk(3)
        assert [each.id for each in token.alternatives] == top.indices.tolist()
        assert [each.log_probability for each in token.alternatives] == pytest.approx(top.values.tolist(), abs=1e-4)


async def test_a_stream_has_the_prompt_in_its_first_message(system: System) -> None:
    key = await system.tenant()
    parts = await system.stream(key, PROMPT, max_tokens=9, samples=2, prompt_log_probabilities=0)
    score = await system.inference.Score(pb.ScoreRequest(text=pb.Prompt(text=PROMPT)), metadata=key)
    assert list(parts[0].prompt) == list(score.tokens)
    assert not any(part.prompt for part in parts[1:])
    (alone,) = (await system.stream(key, "king", max_tokens=1, prompt_log_probabilities=5))[0].prompt
    assert (alone.text, alone.HasField("log_probability")) == ("king", False)


def _edits(served: ServedModel, word: str) -> list[Edit]:
    edit = {"king": copy("king", "ship"), "story": copy("story", "nurse")}[word]
    return read_edits([edit], served.tokenizer, served.manifest.config.num_senses)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (_request(17), "17; 1 to 16, or 0 for 1"),
        (_request(1, priority=101), "101; -100 to 100"),
        (
            pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(prompt_log_probabilities=21)),
            "sampling.prompt_log_probabilities: 21; 0 to 20",
        ),
    ],
)
async def test_out_of_range(system: System, request_: pb.GenerateRequest, says: str) -> None:
    with pytest.raises(ServiceError, match=says), rpc.errors():
        await system.inference.Generate(request_, metadata=await system.tenant())
