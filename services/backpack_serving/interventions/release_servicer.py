"""ReleaseService: releases, and the channels that point at them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1 import interventions_pb2_grpc as grpc_v1

from backpack_serving import rpc
from backpack_serving.auth.identity import Identities
from backpack_serving.auth.keys import Principal
from backpack_serving.interventions import fleet_wire, wire
from backpack_serving.interventions.ledger import WriteResult
from backpack_serving.interventions.records import ChannelRecord, ReleaseRecord, ReleaseStatusRecord
from backpack_serving.interventions.rollouts import Rollouts
from backpack_serving.interventions.service import Interventions
from backpack_serving.wire.references import write_position


class ReleaseServicer(grpc_v1.ReleaseServiceServicer):
    """Releases, and the channels that point at them.

    A channel moves in one write. Waiting for readers does not undo it: the answer says how far it has come.
    """

    def __init__(self, service: Interventions, identities: Identities, rollouts: Rollouts) -> None:
        self._service, self._identities, self._rollouts = service, identities, rollouts

    async def CreateRelease(self, request: pb.CreateReleaseRequest, context: rpc.Context) -> pb.CreateReleaseResponse:
        who = await self._identities.who(context)
        self._service.releases.check_parts(
            request.revisions
        )  # before the work of reading: a message holds a million names
        parts = []
        for at, name in enumerate(request.revisions):
            field = f"revisions[{at}]"
            patch, number = wire.parse_name(field, name, "patches/{}/revisions/{}", who)
            parts.append((patch, wire.parse_number(field, number)))
        idempotency_key = wire.read_idempotency_key(request, request.request_id)
        written = await asyncio.to_thread(
            self._service.releases.create_release, who, parts, request.notes, idempotency_key
        )
        return pb.CreateReleaseResponse(
            release=wire.write_release(*await self._with_status(who, written)),
            position=write_position(written.position),
        )

    async def GetRelease(self, request: pb.GetReleaseRequest, context: rpc.Context) -> pb.GetReleaseResponse:
        who = await self._identities.who(context)
        (text,) = wire.parse_name("name", request.name, "releases/{}", who)
        found = await asyncio.to_thread(self._service.releases.get_release, who, wire.parse_number("name", text))
        return pb.GetReleaseResponse(release=wire.write_release(*found))

    async def ListReleases(self, request: pb.ListReleasesRequest, context: rpc.Context) -> pb.ListReleasesResponse:
        who = await self._identities.who(context)
        after, limit = wire.read_page(request.page_size, request.page_token, int)
        deleted = request.show_deleted
        found = await asyncio.to_thread(self._service.releases.list_releases, who, after, limit, deleted)
        return pb.ListReleasesResponse(
            releases=[wire.write_release(*each) for each in found],
            next_page_token=wire.page_token(found, limit, found[-1][0].number if found else None),
        )

    async def DeleteRelease(self, request: pb.DeleteReleaseRequest, context: rpc.Context) -> pb.DeleteReleaseResponse:
        who = await self._identities.who(context)
        (text,) = wire.parse_name("name", request.name, "releases/{}", who)
        number, key = wire.parse_number("name", text), wire.read_idempotency_key(request, request.request_id)
        written = await asyncio.to_thread(self._service.releases.delete_release, who, number, key)
        return pb.DeleteReleaseResponse(
            release=wire.write_release(*await self._with_status(who, written)),
            position=write_position(written.position),
        )

    async def GetChannel(self, request: pb.GetChannelRequest, context: rpc.Context) -> pb.GetChannelResponse:
        who = await self._identities.who(context)
        (name,) = wire.parse_name("name", request.name, "channels/{}", who)
        found = await asyncio.to_thread(self._service.channels.get_channel, who, name)
        return pb.GetChannelResponse(channel=wire.write_channel(found))

    async def ListChannels(self, request: pb.ListChannelsRequest, context: rpc.Context) -> pb.ListChannelsResponse:
        who = await self._identities.who(context)
        after, limit = wire.read_page(request.page_size, request.page_token, str, wire.LARGEST_PAGE)
        found = await asyncio.to_thread(self._service.channels.list_channels, who, after, limit)
        return pb.ListChannelsResponse(
            channels=map(wire.write_channel, found),
            next_page_token=wire.page_token(found, limit, found[-1].channel if found else None),
        )

    async def Activate(self, request: pb.ActivateRequest, context: rpc.Context) -> pb.ActivateResponse:
        rule = partial(self._service.channels.activate, allow_degradation=request.allow_degradation)
        return pb.ActivateResponse(**await self._move_and_wait(request, context, rule, request.release))

    async def Rollback(self, request: pb.RollbackRequest, context: rpc.Context) -> pb.RollbackResponse:
        return pb.RollbackResponse(**await self._move_and_wait(request, context, self._service.channels.rollback))

    async def StartCanary(self, request: pb.StartCanaryRequest, context: rpc.Context) -> pb.StartCanaryResponse:
        rule = partial(self._service.channels.start_canary, allow_degradation=request.allow_degradation)
        how = request.release, request.permille, request.salt
        return pb.StartCanaryResponse(**await self._move_and_wait(request, context, rule, *how))

    async def PromoteCanary(self, request: pb.PromoteCanaryRequest, context: rpc.Context) -> pb.PromoteCanaryResponse:
        rule = partial(self._service.channels.promote_canary, allow_degradation=request.allow_degradation)
        return pb.PromoteCanaryResponse(**await self._move_and_wait(request, context, rule))

    async def AbortCanary(self, request: pb.AbortCanaryRequest, context: rpc.Context) -> pb.AbortCanaryResponse:
        return pb.AbortCanaryResponse(
            **await self._move_and_wait(request, context, self._service.channels.abort_canary)
        )

    async def _with_status(
        self, who: Principal, written: WriteResult[ReleaseRecord]
    ) -> tuple[ReleaseRecord, ReleaseStatusRecord]:
        return await asyncio.to_thread(self._service.releases.get_release, who, written.record.number)

    async def _move_and_wait(
        self, request: Any, context: rpc.Context, rule: Callable[..., WriteResult[ChannelRecord]], *how: object
    ) -> dict[str, Any]:
        """Carry out a rule of channels; the fields that every answer has."""
        who = await self._identities.who(context)
        (name,) = wire.parse_name("channel", request.channel, "channels/{}", who)
        level, seconds = fleet_wire.read_wait(request)
        idempotency_key = wire.read_idempotency_key(request, request.request_id)
        if isinstance(request, pb.ActivateRequest | pb.StartCanaryRequest) and not request.allow_degradation:
            await self._rollouts.wait_judged(who, request.release)
        written = await asyncio.to_thread(rule, who, name, *how, request.etag, idempotency_key)
        rollout = await self._rollouts.wait(written.record, written.position, level, seconds)
        return {
            "channel": wire.write_channel(written.record),
            "position": write_position(written.position),
            "rollout": fleet_wire.write_rollout(rollout, level) if rollout else None,
        }
