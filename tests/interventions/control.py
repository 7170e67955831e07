"""A running intervention service for the default model, and stubs of it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1 import interventions_pb2_grpc as v1
from backpack_serving import rpc
from backpack_serving.errors import ServiceError
from backpack_serving.interventions import bootstrap
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings


class Control:
    """Stubs of one service, as its admin and as a tenant's releaser."""

    def __init__(self, address: str, admin: str) -> None:
        self.channel = rpc.channel(address)
        self.tenants = v1.TenantServiceStub(self.channel)
        self.patches = v1.PatchServiceStub(self.channel)
        self.releases = v1.ReleaseServiceStub(self.channel)
        self.admin = rpc.with_key(admin)

    async def tenant(self, roles: tuple[Any, ...] = (pb.ROLE_RELEASER,)) -> tuple[str, Any, pb.ApiKey]:
        """A new tenant's name, its credential, and the key."""
        name = f"t{uuid.uuid4().hex[:12]}"
        await self.tenants.CreateTenant(pb.CreateTenantRequest(tenant_id=name), metadata=self.admin)
        request = pb.CreateApiKeyRequest(parent=f"tenants/{name}", roles=roles)
        made = await self.tenants.CreateApiKey(request, metadata=self.admin)
        key = rpc.with_key(made.secret)
        await self.patches.CreatePatch(pb.CreatePatchRequest(patch_id="p", description="first"), metadata=key)
        return f"tenants/{name}", key, made.key


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def control(tmp_path_factory: Any) -> AsyncIterator[Control]:
    state: Path = tmp_path_factory.mktemp("state")
    settings = Settings(state=state, interventions_address="127.0.0.1:0")
    running = await bootstrap.start(settings, Metrics())
    control = Control(running.address, settings.key_for("admin"))
    yield control
    await control.channel.close()
    await running.stop()


async def refused(kind: type[ServiceError], call: Any) -> ServiceError:
    with pytest.raises(kind) as caught, rpc.errors():
        await call
    return caught.value
