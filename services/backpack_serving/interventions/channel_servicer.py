"""The part of ReleaseService that moves channels, and waits until readers hold what was moved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import interventions_pb2 as pb

from backpack_serving import rpc
from backpack_serving.auth.identity import Identities
from backpack_serving.interventions.caller import Caller
from backpack_serving.interventions.ledger import WriteResult
from backpack_serving.interventions.records import ChannelRecord
from backpack_serving.interventions.rollouts import Rollouts
from backpack_serving.interventions.service import Interventions
from backpack_serving.wire import control as wire
from backpack_serving.wire import rollout as wire_rollout


class ChannelMethods(Caller):
    """One write each. What is waited for doesn't undo it: the answer says how far it has come."""

    def __init__(
        self, service: Interventions, tokenizer: Tokenizer, identities: Identities, rollouts: Rollouts
    ) -> None:
        super().__init__(service, tokenizer, identities)
        self._rollouts = rollouts

    async def GetChannel(self, request: pb.GetChannelRequest, context: rpc.Context) -> pb.GetChannelResponse:
        who = await self.who(context)
        (name,) = wire.parse_name("name", request.name, "channels/{}", who)
        found = await asyncio.to_thread(self.service.channel, who, name)
        return pb.GetChannelResponse(channel=wire.write_channel(found))

    async def ListChannels(self, request: pb.ListChannelsRequest, context: rpc.Context) -> pb.ListChannelsResponse:
        who = await self.who(context)
        found = await asyncio.to_thread(self.service.channels, who)
        return pb.ListChannelsResponse(channels=map(wire.write_channel, found))

    async def Activate(self, request: pb.ActivateRequest, context: rpc.Context) -> pb.ActivateResponse:
        return pb.ActivateResponse(
            **await self._move_and_wait(request, context, self.service.activate, request.release)
        )

    async def Rollback(self, request: pb.RollbackRequest, context: rpc.Context) -> pb.RollbackResponse:
        return pb.RollbackResponse(**await self._move_and_wait(request, context, self.service.rollback))

    async def StartCanary(self, request: pb.StartCanaryRequest, context: rpc.Context) -> pb.StartCanaryResponse:
        how = request.release, request.permille, request.salt
        return pb.StartCanaryResponse(**await self._move_and_wait(request, context, self.service.start_canary, *how))

    async def PromoteCanary(self, request: pb.PromoteCanaryRequest, context: rpc.Context) -> pb.PromoteCanaryResponse:
        return pb.PromoteCanaryResponse(**await self._move_and_wait(request, context, self.service.promote_canary))

    async def AbortCanary(self, request: pb.AbortCanaryRequest, context: rpc.Context) -> pb.AbortCanaryResponse:
        return pb.AbortCanaryResponse(**await self._move_and_wait(request, context, self.service.abort_canary))

    async def _move_and_wait(
        self, request: Any, context: rpc.Context, rule: Callable[..., WriteResult[ChannelRecord]], *how: object
    ) -> dict[str, Any]:
        """Carry out a rule of channels; the fields that every answer has."""
        who = await self.who(context)
        (name,) = wire.parse_name("channel", request.channel, "channels/{}", who)
        level, seconds = wire_rollout.read_wait(request)
        again = wire.identify(request, request.request_id)
        written = await asyncio.to_thread(rule, who, name, *how, request.etag, again)
        rollout = await self._rollouts.wait(written.record, written.position, level, seconds)
        return {
            "channel": wire.write_channel(written.record),
            "position": wire.write_position(written.position),
            "rollout": wire_rollout.write_rollout(rollout, level) if rollout else None,
        }
