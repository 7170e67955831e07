"""AuditService: the audit trail and its chain of hashes."""

from __future__ import annotations

import asyncio

from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1 import interventions_pb2_grpc as grpc_v1

from backpack_serving import rpc
from backpack_serving.auth.identity import Identities
from backpack_serving.interventions import wire
from backpack_serving.interventions.service import Interventions


class AuditServicer(grpc_v1.AuditServiceServicer):
    """The audit trail."""

    def __init__(self, service: Interventions, identities: Identities) -> None:
        self._service, self._identities = service, identities

    async def ListAuditEntries(
        self, request: pb.ListAuditEntriesRequest, context: rpc.Context
    ) -> pb.ListAuditEntriesResponse:
        who = await self._identities.who(context)
        after, limit = wire.read_page(request.page_size, request.page_token, int)
        found = await asyncio.to_thread(self._service.events.list_entries, who, after, limit)
        return pb.ListAuditEntriesResponse(
            entries=map(wire.write_audit_entry, found),
            next_page_token=wire.page_token(found, limit, found[-1].revision if found else None),
        )

    async def VerifyChain(self, request: pb.VerifyChainRequest, context: rpc.Context) -> pb.VerifyChainResponse:
        who = await self._identities.who(context)
        entries, broken = await asyncio.to_thread(self._service.events.verify_chain, who)
        return pb.VerifyChainResponse(intact=broken is None, entries=entries, first_broken=broken)
