"""The whole system in this process, over real gRPC, with the default model."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc, interventions_pb2, interventions_pb2_grpc, sync_pb2_grpc
from backpack_serving import embedded, rpc
from backpack_serving.auth.tls import Tls
from backpack_serving.cli.main import app
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.sequence import Output
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings
from typer.testing import CliRunner

from tests.conftest import PROXY_VARIABLES, free_port
from tests.e2e.starts import read_until_served

ipb = interventions_pb2
Metadata = tuple[tuple[str, str], ...]
RUN = [sys.executable, "-m", "backpack_serving.cli.main", "run"]
ANYWHERE = {f"{part}_address": "127.0.0.1:0" for part in ("gateway", "interventions", "directory", "inference")}


def topic(*words: str, strength: int = 3) -> ipb.Edit:
    return ipb.Edit(topic=ipb.TopicEdit(words=[pb.Word(text=word) for word in words], strength=strength))


def copy(word: str, source: str) -> ipb.Edit:
    cells = [ipb.Cells(word=pb.Word(text=word))]
    return ipb.Edit(copy=ipb.CopyEdit(cells=cells, source=pb.Word(text=source)))


@dataclass
class System:
    """Stubs for everything, and shortcuts for what tests do over and over."""

    gateway: str
    interventions: str
    settings: Settings
    metrics: Metrics | None = None
    tls: Tls | None = None
    _channels: list[Any] = field(default_factory=list)
    _names: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        tls = self.tls or self.settings.tls
        gateway, control = rpc.channel(self.gateway, tls), rpc.channel(self.interventions, tls)
        self._channels += [gateway, control]
        self.inference = inference_pb2_grpc.InferenceServiceStub(gateway)
        self.tenants = interventions_pb2_grpc.TenantServiceStub(control)
        self.patches = interventions_pb2_grpc.PatchServiceStub(control)
        self.releases = interventions_pb2_grpc.ReleaseServiceStub(control)
        self.audit = interventions_pb2_grpc.AuditServiceStub(control)
        self.sync = sync_pb2_grpc.SyncServiceStub(control)
        self.fleet = sync_pb2_grpc.FleetServiceStub(control)
        self.admin = rpc.with_key(self.settings.key_for("admin"))
        self.replica = rpc.with_key(self.settings.key_for("replica"))

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def tenant(self, *edits: ipb.Edit) -> Metadata:
        """A new tenant, steered by these edits; its credential, known to the gateway."""
        name = f"t{next(self._names)}"
        await self.tenants.CreateTenant(ipb.CreateTenantRequest(tenant_id=name), metadata=self.admin)
        roles = [ipb.ROLE_RELEASER, ipb.ROLE_CALLER]
        request = ipb.CreateApiKeyRequest(parent=f"tenants/{name}", roles=roles)
        key = rpc.with_key((await self.tenants.CreateApiKey(request, metadata=self.admin)).secret)
        await self.patches.CreatePatch(ipb.CreatePatchRequest(patch_id="p"), metadata=key)
        if edits:
            await self.activate(key, await self.release(key, *edits))
        await self.known(key)
        return key

    async def release(self, key: Metadata, *edits: ipb.Edit) -> int:
        request = ipb.CreateRevisionRequest(parent="patches/p", edits=edits)
        revision = await self.patches.CreateRevision(request, metadata=key)
        made = await self.releases.CreateRelease(
            ipb.CreateReleaseRequest(revisions=[revision.revision.name]), metadata=key
        )
        return int(made.release.number)

    async def activate(self, key: Metadata, release: int, channel: str = "live") -> ipb.ActivateResponse:
        name = f"channels/{channel}"
        listed = await self.releases.ListChannels(ipb.ListChannelsRequest(), metadata=key)
        etag = next((c.etag for c in listed.channels if c.name.endswith(name)), "")
        request = ipb.ActivateRequest(channel=name, release=release, etag=etag)
        return await self.releases.Activate(request, metadata=key)

    async def known(self, key: Metadata) -> None:
        """Wait until the gateway knows all that the store does."""
        at = await self.releases.ListChannels(ipb.ListChannelsRequest(), metadata=key)
        live = next(c for c in at.channels if c.name.endswith("/live"))
        for _ in range(1000):  # on a busy machine that may take long, from the first news on
            try:
                request = pb.ListSensesRequest(word=pb.Word(text="king"), limit=1)
                answer = await self.inference.ListSenses(request, metadata=key)
                if answer.served.release == live.release:
                    return
            except grpc.aio.AioRpcError as error:
                if error.code().name not in ("UNAUTHENTICATED", "UNAVAILABLE"):
                    raise
            await asyncio.sleep(0.02)
        raise AssertionError("the gateway didn't hear of it")

    async def stream(self, key: Metadata, text: str, **sampling: Any) -> list[pb.GenerateStreamResponse]:
        request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=text), sampling=pb.Sampling(**sampling))
        return [part async for part in self.inference.GenerateStream(request, metadata=key)]


@asynccontextmanager
async def running(state: Path, **settings: Any) -> AsyncIterator[System]:
    chosen = Settings(state=state, threads=1, **{**ANYWHERE, **settings})
    async with embedded.run(chosen) as serving:
        system = System(serving.gateway, serving.interventions, serving.settings, serving.metrics)
        try:
            yield system
        finally:
            await system.close()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many tokens engines in this process have made for each request; a step takes ten milliseconds at least."""
    step, tokens = Engine.step, Counter[str]()

    def counted(self: Engine) -> list[Output]:
        time.sleep(0.01)
        outputs = step(self)
        tokens.update(output.request_id for output in outputs)
        return outputs

    monkeypatch.setattr(Engine, "step", counted)
    return tokens


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: Any) -> AsyncIterator[System]:
    async with running(tmp_path_factory.mktemp("state"), slots=4, queue=2) as system:
        yield system


@pytest.fixture(scope="module")
def environment(tmp_path_factory: Any) -> Iterator[dict[str, str]]:
    """`backpack run`, serving its two example tenants."""
    state = tmp_path_factory.mktemp("state")
    environment = {
        **PROXY_VARIABLES,  # whatever these tests call is here
        "BACKPACK_STATE": str(state),
        "BACKPACK_GATEWAY_ADDRESS": f"127.0.0.1:{free_port()}",
        "BACKPACK_INTERVENTIONS_ADDRESS": f"127.0.0.1:{free_port()}",
        "BACKPACK_DIRECTORY_ADDRESS": "127.0.0.1:0",
        "BACKPACK_DEGRADATION": "0.05",
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }
    process = subprocess.Popen(
        RUN,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    environment["SHOWN"] = read_until_served(process)
    yield environment
    process.terminate()
    assert "Finishing" in process.stdout.read()
    assert process.wait(40) == 0
    process.stdout.close()


@pytest.fixture
def backpack(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # rich reads the width once, when it is imported.
    monkeypatch.setattr("backpack_serving.cli.client.out._width", 200)

    def call(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == code, result.output
        return result.output

    return call
