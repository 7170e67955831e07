"""Operating: tenants, their API keys, and the readers of the store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1 import sync_pb2
from backpack_proto.v1.interventions_pb2_grpc import TenantServiceStub
from backpack_proto.v1.sync_pb2_grpc import FleetServiceStub

from backpack_serving.auth.keys import Role
from backpack_serving.client.arguments import build
from backpack_serving.client.channels import Fleet
from backpack_serving.client.connection import PAGE, Connected
from backpack_serving.client.records import ApiKey, NewKey, Tenant
from backpack_serving.errors import InvalidRequest


class AsyncOperator(Connected):
    """Tenants, keys and readers, from the intervention service, for asyncio. Needs the admin's key.

    Make it in the event loop that uses it.
    """

    @cached_property
    def _tenants(self) -> TenantServiceStub:
        return TenantServiceStub(self._transport.channel)

    @cached_property
    def _reader_stub(self) -> FleetServiceStub:
        return FleetServiceStub(self._transport.channel)

    async def create_tenant(self, tenant: str) -> Tenant:
        """A new tenant: 1 to 63 of a-z, 0-9 and "-"."""
        request = build(pb.CreateTenantRequest, tenant_id=tenant)
        return Tenant.of((await self._write(self._tenants.CreateTenant, request)).tenant)

    async def tenants(self) -> tuple[Tenant, ...]:
        """All tenants."""
        found = await self._pages(self._tenants.ListTenants, pb.ListTenantsRequest(), "tenants")
        return tuple(map(Tenant.of, found))

    async def create_key(self, tenant: str, roles: Sequence[Role | str]) -> NewKey:
        """A further key of a tenant; its secret is returned once, so this isn't tried again by itself."""
        request = build(pb.CreateApiKeyRequest, parent=f"tenants/{tenant}", roles=_roles(roles))
        return NewKey.of(await self._once(self._tenants.CreateApiKey, request))

    async def keys(self, tenant: str) -> tuple[ApiKey, ...]:
        """All keys of a tenant, without their secrets."""
        request = build(pb.ListApiKeysRequest, parent=f"tenants/{tenant}")
        return tuple(map(ApiKey.of, await self._pages(self._tenants.ListApiKeys, request, "keys")))

    async def rotate_key(self, tenant: str, key: str) -> NewKey:
        """A key with the roles of another one, which is revoked in the same moment. Not tried again by itself."""
        request = build(pb.RotateApiKeyRequest, name=f"tenants/{tenant}/keys/{key}")
        return NewKey.of(await self._once(self._tenants.RotateApiKey, request))

    async def revoke_key(self, tenant: str, key: str) -> None:
        """Revoke a key, for ever. Gateways hear of it within a second."""
        request = build(pb.RevokeApiKeyRequest, name=f"tenants/{tenant}/keys/{key}")
        await self._write(self._tenants.RevokeApiKey, request)

    async def suspend(self, tenants: Sequence[str], *, force: bool = False) -> None:
        """Refuse all keys of tenants; of more than 10 and a tenth of all only by `force`."""
        request = build(pb.SuspendTenantsRequest, names=_names(tenants), force=force)
        await self._write(self._tenants.SuspendTenants, request)

    async def resume(self, tenants: Sequence[str]) -> None:
        """Let the keys of suspended tenants be good again."""
        await self._write(self._tenants.ResumeTenants, build(pb.ResumeTenantsRequest, names=_names(tenants)))

    async def fleet(self) -> Fleet:
        """All replicas and gateways: in touch or not, how far they are, what they refuse."""
        whole = sync_pb2.ListReadersResponse()
        request = sync_pb2.ListReadersRequest(page_size=PAGE)
        while True:
            answer = await self._call(self._reader_stub.ListReaders, request)
            whole.readers.extend(answer.readers)
            whole.position.CopyFrom(answer.position)
            request.page_token = answer.next_page_token
            if not request.page_token:
                return Fleet.of(whole)


def _roles(roles: Sequence[Role | str]) -> list[pb.Role.ValueType]:
    known = list(Role)
    if unknown := [role for role in roles if role not in known]:
        raise InvalidRequest.at("roles", "UNKNOWN_VALUE", f"{unknown[0]!r}; roles are {', '.join(known)}")
    return [pb.Role.Value(f"ROLE_{role.upper()}") for role in roles]


def _names(tenants: Sequence[str]) -> list[str]:
    return [f"tenants/{tenant}" for tenant in tenants]
