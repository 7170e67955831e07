"""Limits on the wire: of tenants, of messages, of the age of connections."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError

from tests.e2e.conftest import Metadata, System, running

PROMPT = "The story of the king and the"


async def _refused(system: System, key: Metadata, **sampling: int) -> ServiceError:
    with pytest.raises(ServiceError) as refused, rpc.errors():
        await system.stream(key, PROMPT, **sampling)
    return refused.value


async def test_what_a_tenant_may_ask_for(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("")
    async with running(tmp_path, slots=4, limits_file=file, connection_age=0.5) as system:
        # Made while there are no limits: the shortcuts of tests make requests.
        keys = {name: await system.tenant() for name in ("requests", "tokens", "concurrent")}
        names = {k: (await system.stream(key, PROMPT, max_tokens=1))[0].served.tenant for k, key in keys.items()}
        file.write_text(
            f"[{names['requests']}]\nrequests_per_minute = 2\n"
            f"[{names['tokens']}]\ntokens_per_minute = 40\n"
            f"[{names['concurrent']}]\nconcurrent = 1\n"
        )
        await asyncio.sleep(1.1)

        for _ in range(2):
            await system.stream(keys["requests"], PROMPT, max_tokens=1)
        refused = await _refused(system, keys["requests"], max_tokens=1)
        assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "REQUESTS_LIMIT")
        assert refused.retry_after is not None
        assert 20 < refused.retry_after <= 30
        assert refused.quotas == ((f"tenants/{names['requests']}", "2 requests a minute"),)

        # 7 tokens of prompt and up to 100 new ones are charged, 10 are used, the rest comes back.
        await system.stream(keys["tokens"], PROMPT, max_tokens=3, ignore_end_of_text=True)
        call = system.inference.GenerateStream(
            pb.GenerateStreamRequest(
                prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=480, ignore_end_of_text=True)
            ),
            metadata=keys["tokens"],
        )
        await call.read()
        assert (await _refused(system, keys["tokens"], max_tokens=3)).reason == "TOKENS_LIMIT"
        call.cancel()

        call = system.inference.GenerateStream(
            pb.GenerateStreamRequest(
                prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=480, ignore_end_of_text=True)
            ),
            metadata=keys["concurrent"],
        )
        await call.read()
        assert (await _refused(system, keys["concurrent"], max_tokens=3)).reason == "CONCURRENCY_LIMIT"
        call.cancel()
        for _ in range(600):
            try:
                await system.stream(keys["concurrent"], PROMPT, max_tokens=1)
                break
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)
        else:
            raise AssertionError("the place of a cancelled request was never given back")
        await _connections_are_renewed(system, keys["concurrent"])
        await _large_messages_are_refused(system, keys["concurrent"])


async def test_who_does_not_wait_for_an_answer_pays_for_what_was_ordered(tmp_path: Path) -> None:
    """Else a short deadline, or a cancellation just before the end, would have tokens made for nothing."""
    async with running(tmp_path, slots=1, limit_tokens=100) as system:

        def generate(key: Metadata, timeout: float, samples: int = 16) -> Any:
            sampling = pb.Sampling(max_tokens=480, samples=samples, ignore_end_of_text=True)
            request = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), sampling=sampling)
            return system.inference.Generate(request, metadata=key, timeout=timeout)

        late, leaves = await system.tenant(), await system.tenant()
        calls = [generate(late, 1.5), generate(leaves, 60)]
        assert await calls[0].code() is grpc.StatusCode.DEADLINE_EXCEEDED, "7,680 tokens were made in 1.5 s: order more"
        assert calls[1].cancel()
        await asyncio.sleep(1)  # what they didn't use would be given back now
        for key in (late, leaves):
            with pytest.raises(ServiceError) as refused, rpc.errors():
                await generate(key, 60, samples=1)
            assert (refused.value.code, refused.value.reason) == ("RESOURCE_EXHAUSTED", "TOKENS_LIMIT")


async def _connections_are_renewed(system: System, key: Metadata) -> None:
    """With an age of half a second: no call fails, and none is cut off by it."""
    port = int(system.gateway.rpartition(":")[2])

    def connection() -> set[int]:
        found = psutil.Process().net_connections("tcp")
        return {c.laddr.port for c in found if c.raddr and c.raddr.port == port and c.status == "ESTABLISHED"}

    seen: set[int] = set()
    for _ in range(200):
        await system.stream(key, PROMPT, max_tokens=20)
        seen |= connection()
        if len(seen) >= 3:
            return
    raise AssertionError(f"always the same connection: {seen}")


async def _large_messages_are_refused(system: System, key: Metadata) -> None:
    """A message of this size isn't sent again by gRPC when its connection's age ends meanwhile: we ask again."""
    for _ in range(20):
        with pytest.raises(ServiceError) as refused, rpc.errors():
            await system.inference.Tokenize(pb.TokenizeRequest(text="a" * 2**20), metadata=key)
        if refused.value.code != "UNAVAILABLE":
            break
    assert refused.value.code == "RESOURCE_EXHAUSTED"
    assert "larger than max" in refused.value.message
