"""The engine's one thread, and asyncio in front of it."""

from __future__ import annotations

import asyncio
import math
import queue
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable

import structlog
import torch

from backpack_serving.engine.engine import Engine, Load, QueueFull
from backpack_serving.engine.executor import RankLost
from backpack_serving.engine.sequence import Finish, GenerationRequest, Output

LOAD_AGE = 0.05
"""Seconds."""

SWITCH_INTERVAL = 1e-4
"""Seconds after which a thread that runs Python lets another do so. The engine leaves Python for its kernels
several times a step and wants back in each time: behind an event loop that is writing messages it would wait
Python's own 5 ms, as long as a step."""

log = structlog.get_logger(__name__)


class EngineStopped(Exception):
    """The engine takes no requests: it was stopped, or a step failed."""


class ReplicaLost(EngineStopped):
    """A rank ended or hangs, and with it the replica: another replica, or this one once it was started anew, serves."""


class NonFiniteLogits(Exception):
    """The model predicts no numbers under this request's release."""


class NoTokenAllowed(Exception):
    """A request's grammar leaves no token that could come next: why."""


class _TokenStream:
    """One request's tokens on their way to its reader: the first goes at once, then those of `gather` seconds."""

    def __init__(self, gather: float) -> None:
        self._gather = gather
        self._ready: list[Output] = []
        self._failure: Exception | None = None
        self._bell = asyncio.Event()
        self.due = math.inf
        """When the reader is to have what there is."""

    def add(self, output: Output, now: float) -> None:
        if output.first or output.finish:
            self.due = now
        elif not self._ready:
            self.due = now + self._gather
        self._ready.append(output)

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._bell.set()

    def give(self) -> None:
        """Let the reader have what there is."""
        self.due = math.inf
        self._bell.set()

    async def next(self) -> list[Output]:
        """What the reader was given, and all that came while it was busy. Raises what ended the stream."""
        await self._bell.wait()
        self._bell.clear()
        if self._failure:
            raise self._failure
        outputs, self._ready = self._ready, []
        return outputs


class EngineLoop:
    """Steps an engine in a thread of its own; requests come and tokens go through asyncio.

    A step that raises ends every request with EngineStopped: the caches can't be trusted any more.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _TokenStream] = {}
        self._delivered = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._failure: Exception | None = None
        self.load: Load = engine.load  # at most `LOAD_AGE` old
        self._load_due = 0.0
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._thread = threading.Thread(target=self._step_forever, name="engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._failure is None and self._thread.is_alive()

    async def generate(self, request: GenerationRequest, gather: float = 0.0) -> AsyncGenerator[list[Output], None]:
        """The request's tokens: the first at once, then those of `gather` seconds together, the last at once.

        Leaving the iterator early aborts the request. Raises QueueFull, TooManyRows, TooManyTokens,
        NonFiniteLogits, NoTokenAllowed or EngineStopped, of which ReplicaLost is one.
        """
        if isinstance(self._failure, ReplicaLost):
            raise self._failure
        if not self.healthy:
            raise EngineStopped(str(self._failure or "the engine was stopped"))
        stream = self._streams[request.id] = _TokenStream(gather)
        self._inbox.put(lambda: self._add_request(request))
        finished = False
        try:
            while not finished:
                try:
                    outputs = await stream.next()
                except Exception:
                    finished = True
                    raise
                finished = outputs[-1].finish is not None
                if outputs[-1].finish is Finish.NON_FINITE:
                    digest = outputs[-1].digest[:12]
                    raise NonFiniteLogits(
                        f"the model predicts no numbers under release {digest}; roll its channel back"
                    )
                if outputs[-1].finish is Finish.NO_TOKEN:
                    raise NoTokenAllowed(outputs[-1].why)
                yield outputs
        finally:
            del self._streams[request.id]
            if not finished:
                self._inbox.put(lambda: self._engine.abort(request.id))

    async def stop(self) -> None:
        """End the thread after the step that runs, and every request with it."""
        self._failure = self._failure or EngineStopped("the engine was stopped")
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._engine.close)
        self._fail(self._failure)

    # ---- in the engine's thread

    def _step_forever(self) -> None:
        torch.get_num_threads()  # gives this thread that many, of our library's as well: OpenMP counts by thread
        try:
            while self._receive_commands():
                outputs = self._engine.step()
                self._post(self._deliver, outputs)
                self._update_load()
        except Exception as error:
            if isinstance(error, RankLost):
                log.error("a rank is lost, and with it this replica", why=str(error))
                self._failure = ReplicaLost(f"the replica lost a part of the model: {error}")
            else:
                log.exception("the engine failed")
                self._failure = EngineStopped(f"a step failed: {error!r}")
            self._post(self._fail, self._failure)

    def _receive_commands(self) -> bool:
        """Carry out what was sent; wait for something if there is nothing to step. False: stop."""
        while True:
            if idle := not self._engine.busy:
                self._update_load()  # what was left may have been aborted after the last step
            try:
                command = self._inbox.get(block=idle, timeout=self._engine.heartbeat)
            except queue.Empty:
                if idle:
                    self._engine.check()
                    continue
                return True
            if command is None:
                return False
            command()

    def _update_load(self) -> None:
        """Bring `load` up to date, seldom: it goes through all that waits."""
        now = time.monotonic()
        if now >= self._load_due or not self._engine.busy:
            self.load, self._load_due = self._engine.load, now + LOAD_AGE

    def _add_request(self, request: GenerationRequest) -> None:
        try:
            crowded_out = self._engine.add(request)
        except Exception as error:
            self._post(self._fail_request, request.id, error)
        else:
            if crowded_out:
                why = QueueFull("more of this tenant's requests were waiting than of any other's")
                self._post(self._fail_request, crowded_out, why)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            log.warning("the event loop is gone; tokens are dropped")

    # ---- in the event loop

    def _deliver(self, outputs: list[Output]) -> None:
        now = self._loop.time()
        for output in outputs:
            if stream := self._streams.get(output.request_id):
                stream.add(output, now)
        # Whoever would be late after one more step is woken now: readers go by steps, together, not by timers.
        self._wake_due(now + (now - self._delivered))
        self._delivered = now

    def _wake_due(self, until: float) -> None:
        """Give readers what is due until then; look again when more is, should the next step not come before."""
        for stream in self._streams.values():
            if stream.due <= until:
                stream.give()
        if self._timer:
            self._timer.cancel()
        due = min((stream.due for stream in self._streams.values()), default=math.inf)
        self._timer = self._loop.call_at(due, self._wake_due, due) if due < math.inf else None

    def _fail_request(self, request_id: str, error: Exception) -> None:
        if stream := self._streams.get(request_id):
            stream.fail(error)

    def _fail(self, error: Exception) -> None:
        for stream in self._streams.values():
            stream.fail(error)
