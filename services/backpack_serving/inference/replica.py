"""A replica as a process: model, engine, server, and a voice in the directory."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import structlog
from backpack_lm.cores import cores, set_threads
from backpack_lm.kernels import Device, Precision
from backpack_lm.manifest import Manifest
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import PatchLimits, ReleaseContent
from backpack_lm.sharding import check_ranks
from backpack_proto.v1 import directory_pb2, directory_pb2_grpc, inference_pb2_grpc, sync_pb2, sync_pb2_grpc

from backpack_serving import rpc, starting, tasks
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.executor import Executor, RankLost
from backpack_serving.engine.loop import EngineLoop, ReplicaLost
from backpack_serving.engine.runner import Runner
from backpack_serving.engine.scheduler import Scheduler
from backpack_serving.engine.sequence import GenerationRequest
from backpack_serving.engine.slots import OverlayRows, Slots
from backpack_serving.errors import DataLoss, ServiceError
from backpack_serving.inference import ranks
from backpack_serving.inference.directory import REPORT_SECONDS
from backpack_serving.inference.release_cache import Fetch, ReleaseCache
from backpack_serving.inference.release_files import ReleaseFiles
from backpack_serving.inference.required import required
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.inference.servicer import InferenceServicer
from backpack_serving.observability.metrics import Metrics, ReplicaMetrics
from backpack_serving.references import Position, ReaderKind
from backpack_serving.sampling import SamplingParams
from backpack_serving.settings import Settings
from backpack_serving.sync.client import SyncClient
from backpack_serving.sync.messages import SILENCE
from backpack_serving.sync.transport import SyncTransport

log = structlog.get_logger(__name__)

Report = Callable[[directory_pb2.Replica], Awaitable[None]]
"""How a replica tells the directory about itself."""

FETCH_SECONDS = 30.0
TIDY_SECONDS = 600.0

SETTLE_SECONDS = 2 * REPORT_SECONDS
"""How long a draining replica still takes requests: until gateways know, by the directory, that it drains."""


class Replica:
    """A running replica."""

    def __init__(
        self,
        served: ServedModel,
        engine: EngineLoop,
        server: rpc.Server,
        report: Report,
        metrics: ReplicaMetrics,
        drain: float,
        link: SyncTransport,
        releases: ReleaseCache,
    ) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.releases, self._link = releases, link
        self._served, self._engine, self._server = served, engine, server
        self._tell, self._metrics, self._drain = report, metrics, drain
        self._draining = False
        self.failed = asyncio.Event()
        """Set when the engine will make nothing more: the process must be started again."""
        self._tasks = [
            asyncio.create_task(self._keep_reporting()),
            asyncio.create_task(self._run_sync()),
            asyncio.create_task(self._run_cleanup()),
        ]

    @property
    def address(self) -> str:
        return self._server.address

    @property
    def healthy(self) -> bool:
        return self._engine.healthy

    @property
    def position(self) -> Position:
        """Of the store: everything up to here is ready to be served."""
        return self._link.client.view.position

    @property
    def age(self) -> float:
        """Seconds since it was certain that nothing is missing; infinite if that never was."""
        return self._link.client.age(time.monotonic())

    def state(self) -> directory_pb2.Replica:
        load = self._engine.load
        return directory_pb2.Replica(
            id=self.id,
            address=self.address,
            model_fingerprint=self._served.manifest.fingerprint,
            slots=load.slots,
            tokens_in_flight=load.tokens_in_flight,
            running=load.running,
            queued=load.queued,
            draining=self._draining or not self.healthy,
        )

    async def stop(self) -> None:
        """Tell that nothing new is taken, finish what runs, then end."""
        self._draining = True
        with suppress(ServiceError, OSError):
            await self._send_report()
            await asyncio.sleep(SETTLE_SECONDS)
        await self._server.stop(self._drain)
        await tasks.end(*self._tasks)
        self.releases.stop()
        await self._engine.stop()

    async def _run_sync(self) -> None:
        """What is on disk first; then what the intervention service says, for ever."""
        if await asyncio.to_thread(self._link.restore):
            await self.releases.restore(self._link.client.view)
        await self._link.run()

    async def _run_cleanup(self) -> None:
        """On disk, only releases that channels need; never on the word of a service that wasn't heard yet."""
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            if self.age < SILENCE:
                await self.releases.tidy()

    async def _send_report(self) -> None:
        started = time.perf_counter()
        await self._tell(self.state())
        self._metrics.report_seconds.observe(time.perf_counter() - started)

    async def _keep_reporting(self) -> None:
        heard = True
        while True:
            try:
                await self._send_report()
                heard = True
            except ServiceError as error:
                if heard:
                    log.warning("the directory doesn't answer", reason=error.reason, message=error.message)
                heard = False
            if not self.healthy:
                self.failed.set()
            await asyncio.sleep(REPORT_SECONDS)


async def start(
    settings: Settings, report: Report, control: Any, metrics: Metrics, launcher: ranks.Launcher | None = None
) -> Replica:
    """Load the model, make a first token with it, and serve it on `settings.inference_address`.

    `control` is a channel to the intervention service. If that is away, what is in the state folder is served.
    `launcher` starts the ranks but the first, if there are several; by default they are processes of this machine.

    Raises ManifestError or CheckpointError for the model, ValueError if there isn't the memory for these settings, the
    model can't be shared by so many ranks, or certificates are no good, EngineStopped if the first token can't be made,
    RankLost if a rank doesn't start or is lost before that, OSError for the address or a key.
    """
    key = await required(settings)
    device, precision, room = Device(settings.device).torch(), Precision(settings.precision), settings.overlay_rows
    threads = settings.threads if settings.ranks == 1 else settings.threads or max(1, cores() // settings.ranks)
    set_threads(threads)
    check_ranks(Manifest.read(settings.model).config, settings.ranks)  # before minutes of loading
    with _enough_memory(settings):
        read = partial(ServedModel.read, settings.model, precision, room, device, settings.ranks == 1)
        served = await starting.blocking(read)  # from a disk that hangs, perhaps
        served = replace(served, manifest=served.manifest.with_context(settings.context))
        if settings.ranks == 1:
            executor: Executor = Runner(
                served.model,
                served.storage,
                settings.slots,
                context=settings.context,
                cache_tokens=settings.cache_tokens,
            )
        else:
            plan = ranks.plan_of(settings, served, device.type, threads)
            begin = partial(ranks.start, plan, served, launcher or ranks.LocalRanks())
            executor = await starting.blocking(begin, lambda late: late.close())
    engine = EngineLoop(
        Engine(
            executor,
            Slots(settings.slots),
            OverlayRows(settings.overlay_rows),
            Scheduler(settings.step_tokens, settings.queue),
            settings.share_prefixes,
            served.manifest.end_tokens,
        )
    )
    await _first_token(engine, served.table)
    starting.freeze_heap()
    folder = settings.state / "known-good" / "replica"
    releases = ReleaseCache(
        served,
        fetch_from(control, key),
        ReleaseFiles(folder / "releases"),
        settings.releases,
        settings.tenant_bytes,
    )
    measured = metrics.replica(lambda: engine.load, lambda: releases.count)
    servicer = InferenceServicer(served, engine, releases, key, measured)
    service = rpc.Service(
        "backpack.v1.InferenceService",
        inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        servicer,
    )
    server = await rpc.start(
        [service],
        settings.inference_address,
        metrics.calls("inference"),
        tls=settings.tls,
        connection_age=settings.connection_age,
        message_limit=rpc.SMALL,
    )
    reader = SyncClient(ReaderKind.REPLICA, uuid.uuid4().hex, server.address, served.manifest.fingerprint)
    link = SyncTransport(control, key, reader, releases, folder / "view")
    replica = Replica(served, engine, server, report, measured, settings.drain, link, releases)
    log.info("replica serves", address=server.address, slots=settings.slots, model=str(settings.model))
    return replica


@contextmanager
def _enough_memory(settings: Settings) -> Iterator[None]:
    """Raises ValueError, saying which settings to lower, where torch tells that there is no memory."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if "memory" not in str(error).lower():
            raise
        raise ValueError(
            f"no memory for BACKPACK_SLOTS={settings.slots}, BACKPACK_CACHE_TOKENS={settings.cache_tokens} and "
            f"BACKPACK_OVERLAY_ROWS={settings.overlay_rows} of the model in {settings.model}; lower them: {error}"
        ) from None


async def _first_token(engine: EngineLoop, table: SenseTable) -> None:
    """Make one token, with no release, before anybody may ask for one.

    Raises what the engine does if it can't, and RankLost if that is because a rank is lost. Then nothing runs any more.
    """
    overlay = await asyncio.to_thread(Overlay.compile, ReleaseContent(), table)
    request = GenerationRequest("first", "", (0,), SamplingParams(max_tokens=1, temperature=0.0), overlay)
    try:
        async for _ in engine.generate(request):
            pass
    except BaseException as error:
        await engine.stop()
        if isinstance(error, ReplicaLost):
            raise RankLost(f"{error}, before the first token") from None
        raise


def fetch_from(channel: Any, key: str) -> Fetch:
    """Fetch releases from the intervention service behind a channel; what is larger than one may be is refused."""
    stub = sync_pb2_grpc.SyncServiceStub(channel)
    limits = PatchLimits()

    async def fetch(tenant: str, digest: str) -> list[bytes]:
        request = sync_pb2.FetchReleaseRequest(tenant=tenant, digest=digest)
        revisions: list[bytearray] = []
        with rpc.errors():
            async for piece in stub.FetchRelease(request, metadata=rpc.with_key(key), timeout=FETCH_SECONDS):
                if piece.revision == len(revisions):
                    revisions.append(bytearray())
                if piece.revision != len(revisions) - 1 or len(revisions) > limits.revisions:
                    raise DataLoss("CORRUPT", f"release {digest}: a piece of revision {piece.revision} is misplaced")
                revisions[-1] += piece.data
                if len(revisions[-1]) > limits.blob_bytes:
                    raise DataLoss("TOO_LARGE", f"release {digest}: a revision beyond {limits.blob_bytes} bytes")
        return [bytes(data) for data in revisions]

    return fetch


def report_to(channel: Any, metadata: tuple[tuple[str, str], ...] = ()) -> Report:
    """Report to the directory behind a channel."""
    stub = directory_pb2_grpc.DirectoryServiceStub(channel)

    async def report(replica: directory_pb2.Replica) -> None:
        with rpc.errors():
            await stub.Report(directory_pb2.ReportRequest(replica=replica), metadata=metadata, timeout=2)

    return report
