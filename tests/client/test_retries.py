"""A server that is away for some seconds, as a pod that is replaced: which calls outlast that, and which don't."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc as inference
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_proto.v1 import interventions_pb2_grpc as interventions
from backpack_serving import rpc
from backpack_serving.client import (
    AsyncClient,
    AsyncOperator,
    AsyncSteering,
    Client,
    Exhausted,
    Operator,
    ServiceError,
    Steering,
    Tls,
    Unavailable,
)
from backpack_serving.client.connection import LONGEST_PAUSE

from tests.auth.test_tls import Authority
from tests.conftest import free_port

AWAY = 3.0
"""Seconds; four tries were over after 2."""


class Text(inference.InferenceServiceServicer):
    """Counts its calls, and refuses them if it is told how."""

    def __init__(self, refusal: ServiceError | None = None) -> None:
        self.refusal, self.calls = refusal, 0

    def _count(self) -> None:
        self.calls += 1
        if self.refusal:
            raise self.refusal

    async def GetModel(self, request: Any, context: Any) -> pb.GetModelResponse:
        self._count()
        return pb.GetModelResponse(width=8)

    async def Generate(self, request: Any, context: Any) -> pb.GenerateResponse:
        self._count()
        return pb.GenerateResponse(text="fine", finish_reason=pb.FINISH_REASON_LENGTH)

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        self._count()
        yield pb.GenerateStreamResponse(text="fine")


class Patches(interventions.PatchServiceServicer):
    async def CreatePatch(self, request: ipb.CreatePatchRequest, context: Any) -> ipb.CreatePatchResponse:
        return ipb.CreatePatchResponse(patch=ipb.Patch(name=f"tenants/t/patches/{request.patch_id}"))

    async def ListPatches(self, request: Any, context: Any) -> ipb.ListPatchesResponse:
        return ipb.ListPatchesResponse()


class Tenants(interventions.TenantServiceServicer):
    async def CreateApiKey(self, request: Any, context: Any) -> ipb.CreateApiKeyResponse:
        return ipb.CreateApiKeyResponse()


async def start(address: str, text: Text) -> rpc.Server:
    add = inference.add_InferenceServiceServicer_to_server
    patches, tenants = (f"backpack.v1.{name}Service" for name in ("Patch", "Tenant"))
    return await rpc.start(
        [
            rpc.Service("backpack.v1.InferenceService", add, text),
            rpc.Service(patches, interventions.add_PatchServiceServicer_to_server, Patches()),
            rpc.Service(tenants, interventions.add_TenantServiceServicer_to_server, Tenants()),
        ],
        address,
    )


def _blocking(address: str, ask: Callable[[Any], Any], kind: type[Any], **how: Any) -> Any:
    with kind(address, **how) as client:
        return ask(client)


async def _stream(address: str, **how: Any) -> str:
    async with AsyncClient(address, **how) as client:
        return "".join([part.text async for part in client.stream("x")])


async def _awaited(address: str, ask: Callable[[Any], Any], kind: type[Any], **how: Any) -> Any:
    async with kind(address, **how) as client:
        return await ask(client)


async def test_calls_outlast_a_server_that_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """Reads, writes with an id, and generations of which nothing has come, of both kinds of client, at once."""
    address, asking = f"127.0.0.1:{free_port()}", []
    for ask, kind, blocks in (
        (lambda c: c.model(), AsyncClient, Client),
        (lambda c: c.generate("x"), AsyncClient, Client),
        (lambda c: c.patches(), AsyncSteering, Steering),
        (lambda c: c.create_patch("p"), AsyncSteering, Steering),
    ):
        asking.append(_awaited(address, ask, kind, timeout=60.0))
        asking.append(asyncio.to_thread(_blocking, address, ask, blocks, timeout=60.0))
    asking.append(_stream(address))
    joined = "".join
    asking.append(
        asyncio.to_thread(_blocking, address, lambda c: joined(p.text for p in c.stream("x")), Client, timeout=None)
    )
    first = await start(address, Text())
    await _awaited(address, lambda c: c.model(), AsyncClient)
    await first.stop(0)
    running = [asyncio.create_task(each) for each in asking]
    await asyncio.sleep(AWAY)
    assert not [task for task in running if task.done()], "they wait"
    second = await start(address, Text())
    answers = await asyncio.wait_for(asyncio.gather(*running), 2 * LONGEST_PAUSE + 30)
    await second.stop(0)
    assert [answer if isinstance(answer, str) else type(answer).__name__ for answer in answers] == [
        *("Model", "Model", "Generation", "Generation", "tuple", "tuple", "Patch", "Patch"),
        *("fine", "fine"),
    ]
    told = [record.getMessage() for record in caplog.records if record.name == "backpack_serving.client"]
    assert len(told) == len(asking), "once each"
    assert all("refused" in one and "trying again for" in one and address in one for one in told)


@pytest.mark.parametrize(
    "how",
    [{"timeout": 0.5}, {"retry_window": 0.5}, {"retry_window": 0.0}, {"unreached_window": 0.5}, {"attempts": 2}],
    ids=str,
)
async def test_what_ends_before_the_window_ends_the_attempts_and_says_when_to_try(how: dict[str, Any]) -> None:
    """The window is so long that the test would fail by it."""
    how, address = {"retry_window": 3600.0, "timeout": None, **how}, f"127.0.0.1:{free_port()}"
    asking = [
        _stream(address, **how),
        _awaited(address, lambda c: c.model(), AsyncClient, **how),
        asyncio.to_thread(_blocking, address, lambda c: c.generate("x"), Client, **how),
        asyncio.to_thread(_blocking, address, lambda c: c.create_patch("p"), Steering, **how),
    ]
    for failed in await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 60):
        assert isinstance(failed, Unavailable)
        assert failed.reason == "TRANSPORT"
        assert failed.retry_after is not None
        assert failed.retry_after > 0


async def test_a_key_is_asked_for_once() -> None:
    """Its secret is told once: had the answer been lost, another try would make a second key."""
    address, how = f"127.0.0.1:{free_port()}", {"retry_window": 3600.0, "timeout": None}
    for call in (
        _awaited(address, lambda c: c.create_key("t", ["caller"]), AsyncOperator, **how),
        asyncio.to_thread(_blocking, address, lambda c: c.rotate_key("t", "k"), Operator, **how),
    ):
        with pytest.raises(Unavailable):
            await asyncio.wait_for(call, 60)


async def test_what_stays_refused_is_asked_once(tmp_path: Any) -> None:
    text = Text(Exhausted("REQUESTS_LIMIT", "later", retry_after=0.01))
    server = await start("127.0.0.1:0", text)
    how: dict[str, Any] = {"retry_window": 3600.0, "timeout": None}
    with pytest.raises(Exhausted):
        await _awaited(server.address, lambda c: c.model(), AsyncClient, **how)
    with pytest.raises(Exhausted):
        await _stream(server.address, **how)
    assert text.calls == 2
    with pytest.raises(Unavailable) as untrusted:  # it speaks no TLS
        authority = Tls(authorities=Authority(tmp_path, "ours").file)
        await asyncio.wait_for(_awaited(server.address, lambda c: c.model(), AsyncClient, tls=authority, **how), 60)
    assert untrusted.value.retry_after is None
    for address in ("http://127.0.0.1:8470", "no scheme://x", "host:port"):
        with pytest.raises(Unavailable) as nowhere:
            await asyncio.wait_for(_awaited(address, lambda c: c.model(), AsyncClient, timeout=20.0), 60)
        assert nowhere.value.retry_after is None
    await server.stop(0)


async def test_who_has_been_reached_is_waited_for_and_who_never_was_is_not() -> None:
    address, noticed, again = f"127.0.0.1:{free_port()}", [], threading.Event()

    def notice(error: ServiceError, seconds: float) -> None:
        noticed.append((error.reason, seconds))
        again.set()

    how: dict[str, Any] = {"unreached_window": 0.0, "timeout": None, "notice": notice}
    with Client(address, **how) as client:
        first = await start(address, Text())
        assert (await asyncio.to_thread(client.model)).width == 8
        await first.stop(0)
        asking = asyncio.create_task(asyncio.to_thread(client.model))
        await asyncio.to_thread(again.wait, 60)
        second = await start(address, Text())
        assert (await asyncio.wait_for(asking, 60)).width == 8
        await second.stop(0)
    ((reason, seconds),) = noticed
    assert reason == "TRANSPORT"
    assert 20 < seconds <= 30
