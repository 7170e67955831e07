"""The directory of replicas: addresses and loads. Replicas report, gateways watch, silent replicas are dropped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from backpack_proto.v1 import directory_pb2 as pb
from backpack_proto.v1 import directory_pb2_grpc as grpc_v1

from backpack_serving import rpc
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings

SILENCE = 3.0
"""Seconds without a report after which a replica is dropped; replicas report every REPORT_SECONDS."""

REPORT_SECONDS = 0.25
WATCH_SECONDS = 1.0


class Directory:
    """The replicas with a recent report. In memory only: after a restart, the next reports rebuild it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, tuple[float, pb.Replica]] = {}
        self._changed = asyncio.Event()

    def report(self, replica: pb.Replica) -> None:
        """Store a replica's report."""
        old = self._known.get(replica.id)
        self._known[replica.id] = (self._clock(), replica)
        if old is None or old[1] != replica:
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    def replicas(self) -> list[pb.Replica]:
        """The replicas that reported within SILENCE, sorted by id."""
        oldest = self._clock() - SILENCE
        self._known = {name: seen for name, seen in self._known.items() if seen[0] >= oldest}
        return [replica for _, (_, replica) in sorted(self._known.items())]

    async def watch(self) -> AsyncIterator[list[pb.Replica]]:
        """Yield the replicas now, after each change, and at least every WATCH_SECONDS."""
        while True:
            changed = self._changed
            yield self.replicas()
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    await changed.wait()


class DirectoryServicer(grpc_v1.DirectoryServiceServicer):
    """The gRPC service of the directory, in our server or behind Ray Serve's gRPC proxy."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def Report(self, request: pb.ReportRequest, context: rpc.Context) -> pb.ReportResponse:
        self._directory.report(request.replica)
        return pb.ReportResponse()

    async def WatchReplicas(
        self, request: pb.WatchReplicasRequest, context: rpc.Context
    ) -> AsyncIterator[pb.WatchReplicasResponse]:
        async for replicas in self._directory.watch():
            yield pb.WatchReplicasResponse(replicas=replicas)


async def serve(settings: Settings, metrics: Metrics) -> rpc.Server:
    """Start a standalone directory, for deployments without Ray. Raises OSError if the address is in use."""
    service = rpc.Service(
        "backpack.v1.DirectoryService",
        grpc_v1.add_DirectoryServiceServicer_to_server,
        DirectoryServicer(Directory()),
        endless=frozenset({"WatchReplicas"}),
        quiet=frozenset({"Report"}),
    )
    return await rpc.start(
        [service],
        settings.directory_address,
        metrics.calls("directory"),
        tls=settings.tls,
        connection_age=settings.connection_age,
    )
