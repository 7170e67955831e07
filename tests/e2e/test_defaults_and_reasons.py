"""What a request gets that doesn't say how, from wherever it comes; and that a state is shown with its reason."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from backpack_lm.generation import SamplingDefaults
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import sync_pb2
from backpack_serving.cli.main import app
from backpack_serving.client import Client, Sampling
from backpack_serving.rpc import probe
from typer.testing import CliRunner

from tests.e2e.conftest import ANYWHERE, Metadata, System, running

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """The servers are in this process, and log to the same stdout as a command writes to."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("CRITICAL"))


def _key(metadata: Metadata) -> str:
    return metadata[0][1].removeprefix("Bearer ")


async def _cli(system: System, *words: str) -> str:
    """A command in a process of its own: a console keeps the width that it was made with."""
    environment = {
        **os.environ,
        "BACKPACK_GATEWAY_ADDRESS": system.gateway,
        "BACKPACK_INTERVENTIONS_ADDRESS": system.interventions,
        "BACKPACK_STATE": str(system.settings.state),
        "NO_COLOR": "1",
        "COLUMNS": "400",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "backpack_serving.cli.main", *words]
    done = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


async def test_who_names_no_sampling_gets_the_same_text_from_everywhere(system: System) -> None:
    """The model's defaults. A temperature that is named is what it says: 1 is the model's own distribution."""
    tenant = await system.tenant()
    words = ("generate", "The king", "--key", _key(tenant), "--seed", "3", "--max-tokens", "24")
    by_default = await _cli(system, *words)
    explicit = await _cli(system, *words, "--temperature", "0.7", "--top-k", "30")
    whole = await _cli(system, *words, "--temperature", "1", "--top-p", "1")
    assert by_default == explicit != whole

    def ask() -> list[str]:
        ways = Sampling(24, seed=3), Sampling(24, 1.0, seed=3), Sampling(24, top_k=0, seed=3)
        with Client(system.gateway, _key(tenant)) as client:
            assert client.model().defaults == SamplingDefaults(0.7, 30, 1.0)
            return [client.generate("The king", way).text for way in ways]

    texts = await asyncio.to_thread(ask)
    for text, shown in zip(texts, (by_default, whole, whole), strict=True):
        assert shown.startswith(f"The king{text}\n")
    raw = await system.stream(tenant, "The king", max_tokens=24, seed=3)
    assert "".join(part.text for part in raw) == texts[0]
    whole_stream = await system.stream(tenant, "The king", max_tokens=24, seed=3, temperature=1.0)
    assert "".join(part.text for part in whole_stream) == texts[1]


# ---- reasons


async def _refused_stream(system: System, **hello: Any) -> str:
    """Say Hello as a reader and be refused; what gRPC says of it."""
    said = {
        "kind": sync_pb2.READER_KIND_GATEWAY,
        "incarnation": "late",
        "name": "late:1",
        "model_fingerprint": (
            await system.inference.GetModel(pb.GetModelRequest(), metadata=await system.tenant())
        ).fingerprint,
        **hello,
    }

    async def requests() -> AsyncIterator[sync_pb2.SyncRequest]:
        yield sync_pb2.SyncRequest(hello=sync_pb2.Hello(**said))
        await asyncio.sleep(60)

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in system.sync.Sync(requests(), metadata=system.replica):
            pass
    return str(refused.value.details())


@pytest.mark.parametrize(
    ("hello", "reason", "says"),
    [
        ({"position": pb.Position(epoch=99, revision=7)}, "STORE_WENT_BACK", "has applied 99.7: a backup was"),
        ({"model_fingerprint": "ab" * 32}, "WRONG_MODEL", "you serve model abababababab"),
    ],
)
async def test_a_reader_whose_stream_was_refused_is_listed_with_the_reason(
    system: System, hello: dict[str, Any], reason: str, says: str
) -> None:
    """As after a restore without a new epoch: it isn't only the gateway's log that says so."""
    told = await _refused_stream(system, **hello)
    assert says in told
    tenant = await system.tenant()
    status = await _cli(system, "release", "status", "--key", _key(tenant))
    (line,) = [line for line in status.splitlines() if "late:1" in line]
    assert re.search(rf" stale .* {reason}: .*{re.escape(says)}.*\(last heard \d+ s ago\)", line)
    assert sum(" acked " in line for line in status.splitlines()) == 2, "the others are as they were"
    (line,) = [line for line in (await _cli(system, "fleet")).splitlines() if "late:1" in line]
    assert re.search(rf" no .* {reason}: .*{re.escape(says)}", line)


async def test_a_health_check_says_why_not(tmp_path: Path) -> None:
    from backpack_serving.gateway import bootstrap
    from backpack_serving.observability.metrics import Metrics
    from backpack_serving.settings import Settings

    async with running(tmp_path / "all") as system:
        away = {**ANYWHERE, "interventions_address": "127.0.0.1:1", "directory_address": "127.0.0.1:1"}
        settings = Settings(state=tmp_path / "alone", service_key=_key(system.replica), **away)
        gateway = await bootstrap.start(settings, Metrics(0))
        try:
            said, why = "SERVING", ""
            while "TRANSPORT" not in why:
                said, why = await asyncio.to_thread(probe.health, gateway.address, "", 5.0)
                await asyncio.sleep(0.05)
            assert said == "NOT_SERVING"
            assert why == (
                "no news from the intervention service yet (TRANSPORT); "
                "no replica of this model is known to the directory"
            ), "no address: anybody may ask"
            shown = await asyncio.to_thread(CliRunner().invoke, app, ["health", gateway.address])
            assert f"NOT_SERVING: {why}" in " ".join(shown.output.split())
            _, why = await asyncio.to_thread(probe.health, gateway.address, bootstrap.READER, 5.0)
            assert why.startswith("no news")
        finally:
            await gateway.stop()
        assert await asyncio.to_thread(probe.health, system.gateway, "", 5.0) == ("SERVING", "")
