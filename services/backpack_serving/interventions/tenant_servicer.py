"""TenantService: validate, one domain call, translate."""

from __future__ import annotations

import asyncio

from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1 import interventions_pb2_grpc as grpc_v1

from backpack_serving import rpc
from backpack_serving.auth.identity import Identities
from backpack_serving.interventions import wire
from backpack_serving.interventions.service import Interventions
from backpack_serving.wire.references import write_position


class TenantServicer(grpc_v1.TenantServiceServicer):
    """Tenants and their API keys."""

    def __init__(self, service: Interventions, identities: Identities) -> None:
        self._service, self._identities = service, identities

    async def CreateTenant(self, request: pb.CreateTenantRequest, context: rpc.Context) -> pb.CreateTenantResponse:
        who = await self._identities.who(context)
        idempotency_key = wire.read_idempotency_key(request, request.request_id)
        written = await asyncio.to_thread(self._service.tenants.create_tenant, who, request.tenant_id, idempotency_key)
        return pb.CreateTenantResponse(
            tenant=wire.write_tenant(written.record), position=write_position(written.position)
        )

    async def ListTenants(self, request: pb.ListTenantsRequest, context: rpc.Context) -> pb.ListTenantsResponse:
        who = await self._identities.who(context)
        after, limit = wire.read_page(request.page_size, request.page_token, str)
        found = await asyncio.to_thread(self._service.tenants.list_tenants, who, after, limit)
        return pb.ListTenantsResponse(
            tenants=map(wire.write_tenant, found),
            next_page_token=wire.page_token(found, limit, found[-1].tenant if found else None),
        )

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: rpc.Context) -> pb.CreateApiKeyResponse:
        who = await self._identities.who(context)
        tenant = wire.parse_tenant("parent", request.parent)
        roles, idempotency_key = wire.read_roles(request.roles), wire.read_idempotency_key(request, request.request_id)
        written, key = await asyncio.to_thread(self._service.tenants.create_key, who, tenant, roles, idempotency_key)
        return pb.CreateApiKeyResponse(
            key=wire.write_key(written.record),
            secret=str(key) if key else "",
            position=write_position(written.position),
        )

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: rpc.Context) -> pb.ListApiKeysResponse:
        who = await self._identities.who(context)
        tenant = wire.parse_tenant("parent", request.parent)
        after, limit = wire.read_page(request.page_size, request.page_token, str)
        found = await asyncio.to_thread(self._service.tenants.list_keys, who, tenant, after, limit)
        return pb.ListApiKeysResponse(
            keys=map(wire.write_key, found),
            next_page_token=wire.page_token(found, limit, found[-1].key if found else None),
        )

    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, context: rpc.Context) -> pb.RevokeApiKeyResponse:
        who = await self._identities.who(context)
        tenant, key = wire.parse_key("name", request.name)
        idempotency_key = wire.read_idempotency_key(request, request.request_id)
        written = await asyncio.to_thread(self._service.tenants.revoke_key, who, tenant, key, idempotency_key)
        return pb.RevokeApiKeyResponse(position=write_position(written.position))

    async def RotateApiKey(self, request: pb.RotateApiKeyRequest, context: rpc.Context) -> pb.RotateApiKeyResponse:
        who = await self._identities.who(context)
        tenant, old = wire.parse_key("name", request.name)
        idempotency_key = wire.read_idempotency_key(request, request.request_id)
        written, key = await asyncio.to_thread(self._service.tenants.rotate_key, who, tenant, old, idempotency_key)
        return pb.RotateApiKeyResponse(
            key=wire.write_key(written.record),
            secret=str(key) if key else "",
            position=write_position(written.position),
        )

    async def SuspendTenants(
        self, request: pb.SuspendTenantsRequest, context: rpc.Context
    ) -> pb.SuspendTenantsResponse:
        who = await self._identities.who(context)
        names = [wire.parse_tenant(f"names[{at}]", name) for at, name in enumerate(request.names)]
        idempotency_key = wire.read_idempotency_key(request, request.request_id)
        written = await asyncio.to_thread(self._service.tenants.suspend, who, names, request.force, idempotency_key)
        return pb.SuspendTenantsResponse(position=write_position(written.position))

    async def ResumeTenants(self, request: pb.ResumeTenantsRequest, context: rpc.Context) -> pb.ResumeTenantsResponse:
        who = await self._identities.who(context)
        names = [wire.parse_tenant(f"names[{at}]", name) for at, name in enumerate(request.names)]
        idempotency_key = wire.read_idempotency_key(request, request.request_id)
        written = await asyncio.to_thread(self._service.tenants.resume, who, names, idempotency_key)
        return pb.ResumeTenantsResponse(position=write_position(written.position))
