"""The services for readers: their streams, the releases they fetch, and who holds what."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import sync_pb2 as pb
from backpack_proto.v1 import sync_pb2_grpc as grpc_v1

from backpack_serving import rpc
from backpack_serving.auth.identity import Identities
from backpack_serving.auth.keys import Role
from backpack_serving.errors import InvalidRequest, ServiceError
from backpack_serving.interventions.caller import Caller, WriteNotifier, wait
from backpack_serving.interventions.event_history import EventHistory
from backpack_serving.interventions.rollouts import Rollouts
from backpack_serving.interventions.service import Interventions
from backpack_serving.sync.messages import FromReader, Hello
from backpack_serving.sync.server import SyncServer
from backpack_serving.sync.state import ReleaseRef
from backpack_serving.wire import control as wire
from backpack_serving.wire import rollout as wire_rollout
from backpack_serving.wire import sync as wire_sync

POLL_SECONDS = 1.0
THREADS = 2


class SyncServicer(Caller, grpc_v1.SyncServiceServicer):
    """Drives one session a stream: its messages, the bell of the store, and the clock."""

    def __init__(
        self,
        service: Interventions,
        tokenizer: Tokenizer,
        identities: Identities,
        bell: WriteNotifier,
        rollouts: Rollouts,
    ) -> None:
        super().__init__(service, tokenizer, identities)
        self._bell, self._rollouts = bell, rollouts
        self._journal = EventHistory(service)
        self._nonces = itertools.count(secrets.randbits(48))
        # Their own: whatever keeps other threads busy, a bookmark must not come late.
        self._threads = ThreadPoolExecutor(THREADS, "sync")

    async def Sync(
        self, requests: AsyncIterator[pb.SyncRequest], context: rpc.Context
    ) -> AsyncIterator[pb.SyncResponse]:
        (await self.who(context)).require(Role.REPLICA)
        session, hello, refused = SyncServer(self._journal, self._nonces), None, None
        inbox: asyncio.Queue[FromReader | Exception | None] = asyncio.Queue()
        listening = asyncio.create_task(_listen(requests, inbox))
        arrived: asyncio.Task[FromReader | Exception | None] = asyncio.create_task(inbox.get())
        try:
            while True:
                bell = self._bell.next()
                pump = asyncio.get_running_loop().run_in_executor(self._threads, session.pump, time.monotonic())
                for message in await pump:
                    for part in wire_sync.write_to_reader(message):
                        yield part
                seconds = min(POLL_SECONDS, session.due - time.monotonic()) if session.hello else POLL_SECONDS
                rung = asyncio.create_task(wait(bell, seconds))
                await asyncio.wait({rung, arrived}, return_when=asyncio.FIRST_COMPLETED)
                rung.cancel()
                while arrived.done():
                    said = arrived.result()
                    if said is None:
                        return
                    if isinstance(said, Exception):
                        raise said
                    hello = said if isinstance(said, Hello) else hello
                    session.receive(said, time.monotonic())
                    await self._rollouts.heard(session, said)
                    arrived = asyncio.create_task(inbox.get())
                    await asyncio.sleep(0)
        except ServiceError as error:
            refused = error
            raise
        finally:
            listening.cancel()
            arrived.cancel()
            self._rollouts.left(session, refused, hello)

    async def FetchRelease(
        self, request: pb.FetchReleaseRequest, context: rpc.Context
    ) -> AsyncIterator[pb.FetchReleaseResponse]:
        who = await self.who(context)
        blobs = await asyncio.to_thread(self.service.fetch_release, who, request.tenant, request.digest)
        for piece in wire_sync.write_pieces(blobs):
            yield piece

    async def ResolveReleases(
        self, request: pb.ResolveReleasesRequest, context: rpc.Context
    ) -> pb.ResolveReleasesResponse:
        who = await self.who(context)
        position, found = await asyncio.to_thread(self.service.resolve_releases, who, request.tenant, request.numbers)
        refs = [ReleaseRef(release.number, release.digest) for release in found]
        return wire_sync.write_resolved(position, refs)


async def _listen(requests: AsyncIterator[pb.SyncRequest], inbox: asyncio.Queue[FromReader | Exception | None]) -> None:
    """Put what the reader says into the inbox, then None; or what is wrong with it."""
    try:
        async for request in requests:
            inbox.put_nowait(wire_sync.read_from_reader(request))
    except InvalidRequest as error:
        inbox.put_nowait(error)
    else:
        inbox.put_nowait(None)


class FleetServicer(Caller, grpc_v1.FleetServiceServicer):
    def __init__(
        self, service: Interventions, tokenizer: Tokenizer, identities: Identities, rollouts: Rollouts
    ) -> None:
        super().__init__(service, tokenizer, identities)
        self._fleet = rollouts.fleet

    async def GetRollout(self, request: pb.GetRolloutRequest, context: rpc.Context) -> pb.GetRolloutResponse:
        who = await self.who(context)
        (name,) = wire.parse_name("channel", request.channel, "channels/{}", who)
        position, channel = await asyncio.to_thread(self.service.channel_now, who, name)
        response = pb.GetRolloutResponse(
            channel=wire.write_channel(channel),
            holds=map(wire_rollout.write_hold, self._fleet.holds(channel, position)),
        )
        if channel.canary is not None:
            tally = self._fleet.tally(channel.tenant, channel.channel, channel.canary_digest)
            response.canary.CopyFrom(wire_sync.write_tally(tally))
        return response

    async def ListReaders(self, request: pb.ListReadersRequest, context: rpc.Context) -> pb.ListReadersResponse:
        who = await self.who(context)
        who.require(Role.ADMIN)
        position = await asyncio.to_thread(self.service.position)
        return pb.ListReadersResponse(
            readers=[wire_rollout.write_reader(seen, silence) for seen, silence in self._fleet.readers()],
            position=wire.write_position(position),
        )
