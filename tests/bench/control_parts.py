"""The processes of `control_plane`, each asked over a pipe. Only the replica loads torch: memory is measured."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import structlog
import uvloop
from backpack_proto.v1 import inference_pb2, sync_pb2_grpc
from backpack_proto.v1 import sync_pb2 as pb
from backpack_serving import rpc, starting
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings
from backpack_serving.sync.messages import REPORT_SECONDS, SILENCE
from backpack_serving.sync.transport import run_forever

from tests.bench.loop_holds import LoopWatcher

ARRIVALS = 20
"""Simulated readers of each process that come in a second, at first."""


class Part:
    """A process of its own, which is asked over a pipe."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, question: str, *more: Any) -> Any:
        self._pipe.send((question, *more))
        return self._pipe.recv()

    def wait(self) -> Any:
        """What the process says next, by itself."""
        return self._pipe.recv()

    def cpu(self) -> float:
        """Seconds of CPU time that it has used."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


async def _answer(pipe: Any, answer: Callable[..., Any]) -> None:
    """Answer the questions of the parent; returns when it asks for the end."""
    loop, questions = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def listen() -> None:
        with suppress(EOFError, OSError):
            while True:
                question = pipe.recv()
                loop.call_soon_threadsafe(questions.put_nowait, question)

    threading.Thread(target=listen, daemon=True).start()
    while (question := await questions.get())[0] != "stop":
        pipe.send(answer(*question))


def _run(main: Coroutine[Any, Any, None]) -> None:
    """On the loop that our processes have."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    uvloop.run(main)


def _memory() -> dict[str, float]:
    """MiB of memory that the process has now, and had at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[field].split()[0]) / 1024 for name, field in (("now", "VmRSS"), ("most", "VmHWM"))}


def _figures(watcher: LoopWatcher) -> dict[str, Any]:
    return {"holds": asdict(watcher.take()), "memory": _memory()}


def serve_interventions(pipe: Any, settings: Settings) -> None:
    from backpack_serving.interventions import bootstrap

    async def main() -> None:
        watcher = LoopWatcher()
        running = await bootstrap.start(settings, Metrics())
        starting.keep_heap_frozen()
        pipe.send(_figures(watcher))
        await _answer(pipe, lambda question: _figures(watcher))
        await running.stop()
        pipe.send("stopped")

    _run(main())


def serve_gateway(pipe: Any, settings: Settings) -> None:
    from backpack_serving.gateway import bootstrap as gateway

    async def main() -> None:
        watcher = LoopWatcher()
        running = await gateway.start(settings, Metrics())
        starting.keep_heap_frozen()
        pipe.send("started")

        def answer(question: str) -> Any:
            at = running.registry.snapshot().view.position
            return _figures(watcher) if question == "figures" else (at.epoch, at.revision)

        await _answer(pipe, answer)

    _run(main())


def serve_replica(pipe: Any, settings: Settings) -> None:
    from backpack_serving.inference import replica

    async def main() -> None:
        watcher = LoopWatcher()
        report = replica.report_to(rpc.channel(settings.directory_address))
        running = await replica.start(settings, report, rpc.channel(settings.interventions_address), Metrics())
        watcher.take()  # its first token is made before it serves
        pipe.send(_memory())

        def answer(question: str) -> Any:
            return _figures(watcher) if question == "figures" else (running.position.epoch, running.position.revision)

        await _answer(pipe, answer)

    _run(main())


class SimulatedReader:
    """A stream that acknowledges what it is sent, and says when it was."""

    def __init__(self, number: int, address: str, key: str, fingerprint: str, after: float) -> None:
        self._address, self._key = address, key
        self._kind = pb.READER_KIND_GATEWAY if number % 2 else pb.READER_KIND_REPLICA
        self._name, self._fingerprint = f"simulated-{number}", fingerprint
        self.epoch = self.revision = 0
        self.held_at = 0.0
        self._after, self.streams, self.ends = after, 0, Counter[str]()

    async def run(self) -> None:
        channel = rpc.channel(self._address)

        async def follow() -> None:
            self.streams += 1
            await self._follow(sync_pb2_grpc.SyncServiceStub(channel))

        await asyncio.sleep(self._after)
        await run_forever(follow, "interventions", lambda reason: self.ends.update([reason[:60]]))

    async def _follow(self, stub: Any) -> None:
        outbox: asyncio.Queue[pb.SyncRequest] = asyncio.Queue()
        hello = pb.Hello(
            kind=self._kind,
            incarnation=self._name,
            name=self._name,
            model_fingerprint=self._fingerprint,
            position=inference_pb2.Position(epoch=self.epoch, revision=self.revision),
            whole=not self.epoch,
        )
        outbox.put_nowait(pb.SyncRequest(hello=hello))

        async def send() -> AsyncIterator[pb.SyncRequest]:
            while True:
                message = pb.SyncRequest(report=pb.Report())
                with suppress(TimeoutError):
                    async with asyncio.timeout(REPORT_SECONDS):
                        message = await outbox.get()
                yield message

        call = stub.Sync(send(), metadata=rpc.with_key(self._key))
        try:
            while True:
                async with asyncio.timeout(SILENCE):
                    message = await call.read()
                match message.WhichOneof("message"):
                    case "snapshot" if not message.snapshot.more:
                        self._hold(message.snapshot, outbox)
                    case "delta":
                        self._hold(message.delta, outbox)
                    case "resync_required":
                        self.epoch = self.revision = 0
                        return
        finally:
            call.cancel()

    def _hold(self, change: Any, outbox: asyncio.Queue[pb.SyncRequest]) -> None:
        self.epoch, self.revision, self.held_at = change.position.epoch, change.position.revision, time.monotonic()
        outbox.put_nowait(pb.SyncRequest(ack=pb.Ack(nonce=change.nonce)))


def simulate(pipe: Any, first: int, count: int, address: str, key: str, fingerprint: str) -> None:
    """Readers that come one after the other, ARRIVALS in a second."""

    async def main() -> None:
        readers = [SimulatedReader(first + n, address, key, fingerprint, n / ARRIVALS) for n in range(count)]
        running = [asyncio.create_task(reader.run()) for reader in readers]

        def answer(question: str) -> Any:
            if question == "ends":
                return sum((reader.ends for reader in readers), Counter[str]())
            return [(r.epoch, r.revision, r.held_at, r.streams) for r in readers]

        await _answer(pipe, answer)
        for task in running:
            task.cancel()

    _run(main())
