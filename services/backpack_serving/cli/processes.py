"""Several processes of one server behind one port: the kernel spreads connections over them (SO_REUSEPORT).

The process that starts them serves nobody. It replaces one that dies, passes SIGTERM on and waits until all have
drained, and answers Prometheus for all of them. They are spawned, not forked: gRPC's threads don't survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from backpack_serving.settings import Settings

log = structlog.get_logger(__name__)

Serve = Callable[[Settings, int, Connection], None]
"""Serves as process number n until it gets SIGTERM, and calls `report` when it serves."""

PAUSE = 1.0
"""Seconds before a process that died is replaced."""

SCRAPE_SECONDS = 5.0
"""How long a process has to tell its metrics; one that doesn't is left out of this answer."""

ENDING = 10.0
"""Seconds that a process has to end after its grace period."""


def reserve(address: str) -> tuple[socket.socket, str]:
    """A socket that holds a port for others to share and takes no connection itself; the address with that port.

    Raises OSError if a server is there already, even one that would share the port: it is another one's.
    """
    if address.startswith("unix:"):
        raise OSError(f"can't share {address} between processes: set BACKPACK_GATEWAY_PROCESSES=1, or host:port")
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where = host.strip("[]"), int(port)
    held = socket.socket(family)
    try:
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are no server
            trial.bind(where)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(where)
    except OSError as error:
        held.close()
        raise OSError(
            f"can't listen on {address} (BACKPACK_GATEWAY_ADDRESS): {error.strerror}; is another server there?"
        ) from None
    return held, f"{host}:{held.getsockname()[1]}"


@dataclass(slots=True)
class _Process:
    running: SpawnProcess
    line: Connection
    serves: bool = False


class Processes:
    """So many processes; as a collector, the metrics of all of them, each with its number as `worker`.

    They aren't added up: counters of a process that was replaced begin anew, and Prometheus has to see whose.
    """

    def __init__(self, serve: Serve, settings: Settings, count: int) -> None:
        self._serve, self._settings, self._count = serve, settings, count
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[int, _Process] = {}
        self._stopping = self._serving = False
        self._scrape = 0
        self._scraping = threading.Lock()

    def run(self, serving: Callable[[], None]) -> int:
        """Run them until SIGTERM or SIGINT; then they get SIGTERM, too, and all is over when the last has drained.

        `serving` is called once all of them serve. A signal before that is the result, 0 if it came later; a
        second one kills them. Raises OSError if one doesn't come up.
        """
        woken, wake = self._context.Pipe(duplex=False)
        stopped_by = 0

        def stop(number: int, _: object) -> None:
            nonlocal stopped_by
            if not self._serving:
                if self._stopping:
                    self._kill()
                stopped_by = number
            self._stopping = True
            wake.send(None)

        with ExitStack() as ending:
            for name in (signal.SIGINT, signal.SIGTERM):
                ending.callback(signal.signal, name, signal.signal(name, stop))
            ending.callback(self._stop_all)  # before that: a second signal must not cut a drain off
            for number in range(self._count):
                self._start_process(number)
            while not self._stopping:
                self._wait_for_change(woken, all_must_live=not self._serving)
                if not self._serving and all(process.serves for process in self._processes.values()):
                    serving()
                    self._serving = True
        return stopped_by

    def _kill(self) -> None:
        for process in list(self._processes.values()):
            process.running.kill()

    def _start_process(self, number: int) -> None:
        ours, theirs = self._context.Pipe()
        running = self._context.Process(
            target=self._serve, args=(self._settings, number, theirs), name=f"process {number}"
        )
        running.start()
        theirs.close()  # so that ours ends when the process does
        self._processes[number] = _Process(running, ours)

    def _wait_for_change(self, woken: Connection, all_must_live: bool) -> None:
        """Wait until something happens: one serves, one dies, or it is time to stop."""
        starting = {p.line: p for p in self._processes.values() if not p.serves}
        happened = wait([woken, *starting, *(p.running.sentinel for p in self._processes.values())])
        for line, process in starting.items():
            if line in happened:
                with suppress(EOFError, OSError):  # it died
                    process.serves = line.recv()
        for number, process in list(self._processes.items()):
            if self._stopping or process.running.is_alive():
                continue
            if all_must_live:
                raise OSError("one of the processes didn't come up; what it said is above")
            log.error("a process died; another takes its place", number=number, status=process.running.exitcode)
            time.sleep(PAUSE)
            with self._scraping:
                process.line.close()
            if not self._stopping:
                self._start_process(number)

    def _stop_all(self) -> None:
        for process in self._processes.values():
            process.running.terminate()
        until = time.monotonic() + (self._settings.drain if self._serving else 0.0) + ENDING
        for number, process in self._processes.items():
            process.running.join(max(0.0, until - time.monotonic()))
            if process.running.is_alive():
                log.error("a process didn't end in time; it is killed", number=number)
                process.running.kill()

    # ---- prometheus_client's Collector, in the thread of a scrape

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        with self._scraping:
            self._scrape += 1
            asked = []
            for number, process in list(self._processes.items()):
                with suppress(OSError):  # it died
                    if process.serves:
                        process.line.send(self._scrape)
                        asked.append((number, process.line))
            until = time.monotonic() + SCRAPE_SECONDS
            for number, line in asked:
                for metric in self._answer(line, until):
                    family = families.setdefault(metric.name, metric)
                    told = [s._replace(labels={**s.labels, "worker": str(number)}) for s in metric.samples]
                    family.samples = told if family is metric else family.samples + told
        yield from families.values()

    def _answer(self, line: Connection, until: float) -> list[Metric]:
        with suppress(EOFError, OSError):
            while line.poll(max(0.0, until - time.monotonic())):
                scrape, metrics = line.recv()
                if scrape == self._scrape:  # an earlier one's came too late
                    return list(metrics)
        return []


def report(line: Connection, registry: CollectorRegistry) -> None:
    """Tell the process that started this one that it serves, and then its metrics whenever they are asked for.

    When that process is gone, however it went, this one gets SIGTERM.
    """

    def answer() -> None:
        with suppress(EOFError, OSError):
            while True:
                line.send((line.recv(), list(registry.collect())))
        os.kill(os.getpid(), signal.SIGTERM)

    line.send(True)
    threading.Thread(target=answer, name="metrics", daemon=True).start()
