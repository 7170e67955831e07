"""SyncService for readers (streams, releases), and FleetService about readers."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any

from backpack_proto.v1 import sync_pb2 as pb
from backpack_proto.v1 import sync_pb2_grpc as grpc_v1

from backpack_serving import rpc, tasks
from backpack_serving.auth.identity import Identities
from backpack_serving.auth.keys import Role
from backpack_serving.errors import ServiceError
from backpack_serving.interventions import fleet_wire, wire
from backpack_serving.interventions.event_history import EventHistory
from backpack_serving.interventions.fleet import Place, ReaderStatus
from backpack_serving.interventions.history_tail import HistoryTail
from backpack_serving.interventions.rollouts import Rollouts
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.write_notifier import WriteNotifier
from backpack_serving.sync.server import SyncServer
from backpack_serving.sync.server_stream import ReaderStreams
from backpack_serving.wire.references import read_ref, write_position, write_tally

THREADS = 2


class SyncServicer(grpc_v1.SyncServiceServicer):
    """One `SyncServer` a stream, over the events of the store."""

    def __init__(self, service: Interventions, identities: Identities, rollouts: Rollouts) -> None:
        self._service, self._identities, self._rollouts = service, identities, rollouts
        # A pool of its own, so that other work never delays a bookmark.
        threads = ThreadPoolExecutor(THREADS, "sync")
        self._history = HistoryTail(EventHistory(service), threads)
        self._streams = ReaderStreams(self._history, threads)
        self._history.on_news = self._streams.wake
        self._nonces = itertools.count(secrets.randbits(48))

    async def follow(self, writes: WriteNotifier) -> None:
        """Tell the streams of each write, for ever."""
        await self._history.follow(writes.next_write)

    async def Sync(
        self, requests: AsyncIterator[pb.SyncRequest], context: rpc.Context
    ) -> AsyncIterator[Any]:  # of encoded messages
        (await self._identities.who(context)).require(Role.REPLICA)
        server, refused = SyncServer(self._history, self._nonces), None
        on_message = partial(self._rollouts.receive, server)
        stream = self._streams.serve(server, requests, on_message)
        try:
            async with aclosing(stream):
                async for message in stream:
                    yield message
        except ServiceError as error:
            refused = error
            raise
        finally:
            self._rollouts.disconnect(server, refused, server.last_hello)

    async def FetchRelease(
        self, request: pb.FetchReleaseRequest, context: rpc.Context
    ) -> AsyncIterator[pb.FetchReleaseResponse]:
        who = await self._identities.who(context)
        blobs = await asyncio.to_thread(self._service.releases.fetch_release, who, request.tenant, request.digest)
        for piece in wire.write_pieces(blobs):
            yield piece

    async def ResolveReleases(
        self, request: pb.ResolveReleasesRequest, context: rpc.Context
    ) -> pb.ResolveReleasesResponse:
        who = await self._identities.who(context)
        position, found = await asyncio.to_thread(
            self._service.releases.resolve_releases, who, request.tenant, request.numbers
        )
        refs = [release.ref for release in found]
        return wire.write_resolved(position, refs)

    async def RecordJudgement(
        self, request: pb.RecordJudgementRequest, context: rpc.Context
    ) -> pb.RecordJudgementResponse:
        who = await self._identities.who(context)
        given = request.judgement
        kept = await asyncio.to_thread(
            self._service.judgements.record,
            who,
            request.tenant,
            read_ref(request.release),
            given.tokens,
            given.perplexity_before,
            given.perplexity_after,
        )
        return pb.RecordJudgementResponse(judgement=wire.write_judgement(kept))


class FleetServicer(grpc_v1.FleetServiceServicer):
    """Lists the readers, and the releases that they hold."""

    def __init__(self, service: Interventions, identities: Identities, rollouts: Rollouts) -> None:
        self._service, self._identities, self._fleet = service, identities, rollouts.fleet

    async def GetRollout(self, request: pb.GetRolloutRequest, context: rpc.Context) -> pb.GetRolloutResponse:
        who = await self._identities.who(context)
        (name,) = wire.parse_name("channel", request.channel, "channels/{}", who)
        place, limit = _read_page(request)
        position, channel = await asyncio.to_thread(self._service.channels.channel_now, who, name)
        found = self._fleet.readers(place)[:limit]
        following = _page_token(found, limit)  # now: a reader may say Hello by another name meanwhile
        response = pb.GetRolloutResponse(
            channel=wire.write_channel(channel),
            holds=await tasks.in_slices(fleet_wire.write_hold, self._fleet.holds(channel, position, found)),
            next_page_token=following,
        )
        if channel.canary is not None:
            tally = self._fleet.tally(channel.tenant, channel.channel, channel.canary_digest)
            response.canary.CopyFrom(write_tally(tally))
        return response

    async def ListReaders(self, request: pb.ListReadersRequest, context: rpc.Context) -> pb.ListReadersResponse:
        who = await self._identities.who(context)
        who.require(Role.ADMIN)
        place, limit = _read_page(request)
        position = await asyncio.to_thread(self._service.events.position)
        found = self._fleet.readers(place)[:limit]
        following = _page_token(found, limit)  # now: a reader may say Hello by another name meanwhile
        return pb.ListReadersResponse(
            readers=await tasks.in_slices(lambda seen: fleet_wire.write_reader(*seen), found),
            position=write_position(position),
            next_page_token=following,
        )


def _read_page(request: pb.GetRolloutRequest | pb.ListReadersRequest) -> tuple[Place | None, int]:
    """The reader after which a page of readers begins, and how many it has. Raises InvalidRequest."""
    after, limit = wire.read_page(request.page_size, request.page_token, str, wire.LARGEST_PAGE)
    return None if after is None else fleet_wire.read_place(after), limit


def _page_token(found: Sequence[tuple[ReaderStatus, float]], limit: int) -> str:
    return wire.page_token(found, limit, fleet_wire.write_place(found[-1][0]) if found else None)
