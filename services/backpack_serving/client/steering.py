"""Steering: what an author may, the channels that point at releases, who holds them, and the audit trail."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1 import sync_pb2
from backpack_proto.v1.interventions_pb2_grpc import AuditServiceStub
from backpack_proto.v1.sync_pb2_grpc import FleetServiceStub

from backpack_serving.client.arguments import build, fill
from backpack_serving.client.authoring import Authoring
from backpack_serving.client.channels import Channel, Move, Status, Wait
from backpack_serving.client.connection import PAGE
from backpack_serving.client.records import AuditEntry, Chain
from backpack_serving.errors import Expired, InvalidRequest, NotFound, PreconditionFailed

POLL = 0.2
"""Seconds between two looks at a channel."""

JUDGING_SECONDS = 10.0
"""Longest that the service waits for the judgement of a release that was just made."""

_WAITS = {"none": pb.WAIT_NONE, "quorum": pb.WAIT_QUORUM, "all": pb.WAIT_ALL}


class AsyncSteering(Authoring):
    """Patches, releases and channels of the key's tenant, from the intervention service, for asyncio.

    Make it in the event loop that uses it. The package says how channels are moved (`etag`, `wait`), and what is
    raised.
    """

    @cached_property
    def _rollout_stub(self) -> FleetServiceStub:
        return FleetServiceStub(self._transport.channel)

    @cached_property
    def _audit(self) -> AuditServiceStub:
        return AuditServiceStub(self._transport.channel)

    async def channel(self, channel: str = "live") -> Channel:
        """Where one channel is."""
        request = build(pb.GetChannelRequest, name=f"channels/{channel}")
        return Channel.of((await self._call(self._releases.GetChannel, request)).channel)

    async def channels(self) -> tuple[Channel, ...]:
        """All channels."""
        found = await self._pages(self._releases.ListChannels, pb.ListChannelsRequest(), "channels")
        return tuple(map(Channel.of, found))

    async def activate(
        self,
        release: int,
        channel: str = "live",
        *,
        allow_degradation: bool = False,
        etag: str | None = None,
        wait: Wait = "none",
        wait_seconds: float = 10.0,
    ) -> Move:
        """Point a channel at a release; 0 is the model unpatched. A channel that isn't there is made.

        Raises PreconditionFailed (DEGRADES) for a release that makes ordinary text much worse, unless that is allowed.
        """
        request = build(pb.ActivateRequest, release=release, allow_degradation=allow_degradation)
        if etag is None:
            try:
                etag = (await self.channel(channel)).etag
            except NotFound:
                etag = ""
        return await self._move_channel_call(self._releases.Activate, request, channel, etag, wait, wait_seconds)

    async def rollback(
        self,
        channel: str = "live",
        *,
        etag: str | None = None,
        wait: Wait = "none",
        wait_seconds: float = 10.0,
    ) -> Move:
        """Point a channel back at the release it had before. Replicas have it still."""
        request = pb.RollbackRequest()
        return await self._move_channel_call(self._releases.Rollback, request, channel, etag, wait, wait_seconds)

    async def start_canary(
        self,
        release: int,
        permille: int,
        channel: str = "live",
        *,
        salt: str = "",
        allow_degradation: bool = False,
        etag: str | None = None,
        wait: Wait = "none",
        wait_seconds: float = 10.0,
    ) -> Move:
        """Give so many of a thousand request keys (1 to 999) another release; again, to change how many.

        The salt, which decides who they are, is drawn if none is given. Raises as `activate` does.
        """
        request = build(
            pb.StartCanaryRequest, release=release, permille=permille, salt=salt, allow_degradation=allow_degradation
        )
        return await self._move_channel_call(self._releases.StartCanary, request, channel, etag, wait, wait_seconds)

    async def promote_canary(
        self,
        channel: str = "live",
        *,
        allow_degradation: bool = False,
        etag: str | None = None,
        wait: Wait = "none",
        wait_seconds: float = 10.0,
    ) -> Move:
        """Give the canary's release to all requests. Raises as `activate` does."""
        request = build(pb.PromoteCanaryRequest, allow_degradation=allow_degradation)
        return await self._move_channel_call(self._releases.PromoteCanary, request, channel, etag, wait, wait_seconds)

    async def abort_canary(
        self,
        channel: str = "live",
        *,
        etag: str | None = None,
        wait: Wait = "none",
        wait_seconds: float = 10.0,
    ) -> Move:
        """Give all requests the channel's own release again."""
        request = pb.AbortCanaryRequest()
        return await self._move_channel_call(self._releases.AbortCanary, request, channel, etag, wait, wait_seconds)

    async def status(self, channel: str = "live") -> Status:
        """Which replicas and gateways hold a channel's release, and its canary."""
        return await self._status(channel)

    async def until_held(self, channel: str = "live", wait: Wait = "all", *, seconds: float = 60.0) -> Status:
        """Wait until a channel's release, and its canary's, are held by all who are connected, or a quorum.

        Raises PreconditionFailed (REFUSED) if too many refuse it, Expired (NOT_HELD) after so many seconds.
        """
        _check_wait(wait)
        until = time.monotonic() + seconds
        while not (status := await self._status(channel, max(POLL, until - time.monotonic()))).held(wait):
            told = f"{status.channel.name}, release {status.channel.release}"
            if refusals := status.refused(wait):
                why = "; ".join(f"{hold.reader}, release {hold.release}: {hold.why}" for hold in refusals)
                raise PreconditionFailed("REFUSED", f"{told} is refused ({why}); roll back, or release another")
            if time.monotonic() >= until:
                late = [hold.reader for hold in status.holds if hold.connected and hold.state != "acked"]
                who = f"by {', '.join(late)}" if late else "by both: no replica or no gateway is connected"
                raise Expired("NOT_HELD", f"{told} isn't held after {seconds:g} s {who}; see its status")
            await self._transport.sleep(POLL)
        return status

    async def audit(self, limit: int | None = None) -> tuple[AuditEntry, ...]:
        """Who changed what, newest first; all of it without a limit."""
        request = pb.ListAuditEntriesRequest()
        found = await self._pages(self._audit.ListAuditEntries, request, "entries", limit)
        return tuple(map(AuditEntry.of, found))

    async def verify_audit(self) -> Chain:
        """Whether the chain of hashes over all entries is whole."""
        return Chain.of(await self._call(self._audit.VerifyChain, pb.VerifyChainRequest()))

    async def _status(self, channel: str, timeout: float | None = None) -> Status:
        """Of all readers, page by page; from the beginning again if the channel is moved meanwhile."""
        request = build(sync_pb2.GetRolloutRequest, channel=f"channels/{channel}", page_size=PAGE)
        holds: list[sync_pb2.Hold] = []
        etag = ""
        while True:
            answer = await self._call(self._rollout_stub.GetRollout, request, timeout)
            if request.page_token and answer.channel.etag != etag:
                request.page_token, holds = "", []
                continue
            holds += answer.holds
            etag, request.page_token = answer.channel.etag, answer.next_page_token
            if not request.page_token:
                del answer.holds[:]
                answer.holds.extend(holds)
                return Status.of(answer)

    async def _move_channel_call(
        self, method: Any, request: Any, channel: str, etag: str | None, wait: Wait, wait_seconds: float
    ) -> Move:
        _check_wait(wait)
        fill(request, channel=f"channels/{channel}", wait=_WAITS[wait])
        request.wait_timeout.FromMicroseconds(round(wait_seconds * 1e6))
        fill(request, etag=(await self.channel(channel)).etag if etag is None else etag)
        timeout = None if self._timeout is None else self._timeout + JUDGING_SECONDS + wait_seconds
        return Move.of(await self._write(method, request, timeout))


def _check_wait(wait: Wait) -> None:
    if wait not in _WAITS:
        raise InvalidRequest.at("wait", "UNKNOWN_VALUE", f"{wait!r}; write none, quorum or all")
