"""A release by its number, in place of a channel's; and what would have been likelier in a score."""

from __future__ import annotations

from typing import Any

import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError
from backpack_serving.inference.served_model import ServedModel

from tests.e2e.conftest import System, copy

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = pb.Prompt(text="The story of the king and the")
REQUESTS: dict[str, Any] = {
    "Generate": pb.GenerateRequest(prompt=PROMPT, sampling=pb.Sampling(max_tokens=2, temperature=0)),
    "GenerateStream": pb.GenerateStreamRequest(prompt=PROMPT, sampling=pb.Sampling(max_tokens=2, temperature=0)),
    "Score": pb.ScoreRequest(text=PROMPT),
    "Explain": pb.ExplainRequest(prompt=PROMPT),
    "ListSenses": pb.ListSensesRequest(word=pb.Word(text="king"), limit=1),
    "FindSenses": pb.FindSensesRequest(words=[pb.Word(text="king")]),
    "MapSense": pb.MapSenseRequest(sense=1, words=[pb.Word(text=word) for word in ("king", "ship", "sea")]),
    "ListUses": pb.ListUsesRequest(word=pb.Word(text="king"), limit=1),
}


async def _answer(system: System, method: str, request: Any, key: Any) -> Any:
    call = getattr(system.inference, method)(request, metadata=key)
    with rpc.errors():
        if method != "GenerateStream":
            return await call
        first, *_ = [part async for part in call]
        return first


@pytest.mark.parametrize("method", REQUESTS)
async def test_every_call_takes_the_number_of_a_release(system: System, method: str) -> None:
    key = await system.tenant(copy("king", "ship"))
    second = await system.release(key, copy("king", "nurse"))  # no channel is at it
    answers = {}
    for number in (0, 1, second):
        request = type(REQUESTS[method])()
        request.CopyFrom(REQUESTS[method])
        request.release = number
        answers[number] = await _answer(system, method, request, key)
        assert answers[number].served.release == number
        request.channel = "live"
        assert (await _answer(system, method, request, key)).served.release == number, "wherever the channel is"
    live = await _answer(system, method, REQUESTS[method], key)
    assert live.served.release_digest == answers[1].served.release_digest
    assert len({answer.served.release_digest for answer in answers.values()}) == 3


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"release": 99}, ("NOT_FOUND", "NO_SUCH_RELEASE")),
        ({"release": -1}, ("INVALID_ARGUMENT", "OUT_OF_RANGE")),
        ({"release": 0, "channel": "nowhere"}, ("NOT_FOUND", "NO_SUCH_CHANNEL")),
    ],
)
async def test_a_release_that_isnt_is_refused(system: System, fields: Any, refusal: tuple[str, str]) -> None:
    key = await system.tenant()
    with pytest.raises(ServiceError) as refused:
        await _answer(system, "Score", pb.ScoreRequest(text=PROMPT, **fields), key)
    assert (refused.value.code, refused.value.reason) == refusal


async def test_a_score_lists_what_would_have_been_likelier(system: System, served: ServedModel) -> None:
    key = await system.tenant(copy("king", "ship"))
    plain = await _answer(system, "Score", pb.ScoreRequest(text=PROMPT), key)
    listed = await _answer(system, "Score", pb.ScoreRequest(text=PROMPT, alternatives=3), key)
    assert [token.log_probability for token in listed.tokens] == [token.log_probability for token in plain.tokens]
    assert not any(token.alternatives for token in plain.tokens)
    assert [len(token.alternatives) for token in listed.tokens] == [0] + [3] * (len(listed.tokens) - 1)
    for at, token in list(enumerate(listed.tokens))[1:]:
        start = pb.Prompt(tokens=pb.TokenIds(ids=[before.id for before in listed.tokens[:at]]))
        releases = [pb.ReleaseChoice(channel="live")]
        request = pb.CompareRequest(prompt=start, releases=releases, top=3)
        (compared,) = (await system.inference.Compare(request, metadata=key)).releases
        assert [each.id for each in token.alternatives] == [each.id for each in compared.next.top]
        for one, other in zip(token.alternatives, compared.next.top, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
    for wrong in (-1, 21):
        with pytest.raises(ServiceError) as refused:
            await _answer(system, "Score", pb.ScoreRequest(text=PROMPT, alternatives=wrong), key)
        assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", "OUT_OF_RANGE")
