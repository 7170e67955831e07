"""The engine's one thread, and asyncio in front of it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable

import structlog

from backpack_serving.engine.engine import Engine, Load
from backpack_serving.engine.sequence import Output, Request

log = structlog.get_logger(__name__)


class EngineStopped(Exception):
    """The engine takes no requests: it was stopped, or a step failed."""


class EngineLoop:
    """Steps an engine in a thread of its own; requests come and tokens go through asyncio.

    A step that raises ends every request with EngineStopped: the caches can't be trusted any more.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[Output | Exception]] = {}
        self._failure: Exception | None = None
        self.load: Load = engine.load
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._failure is None and self._thread.is_alive()

    async def generate(self, request: Request) -> AsyncGenerator[list[Output], None]:
        """The request's tokens, each time all that have been made since the last.

        Leaving the iterator early aborts the request. Raises QueueFull, TooManyRows or EngineStopped.
        """
        if not self.healthy:
            raise EngineStopped(str(self._failure or "the engine was stopped"))
        stream: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self._streams[request.id] = stream
        self._inbox.put(lambda: self._add(request))
        finished = False
        try:
            while not finished:
                ready = [await stream.get()]
                while not stream.empty():
                    ready.append(stream.get_nowait())
                outputs: list[Output] = []
                for item in ready:
                    if isinstance(item, Exception):
                        finished = True
                        raise item
                    outputs.append(item)
                    finished = item.finish is not None
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
        self._fail(self._failure)

    # ---- in the engine's thread

    def _run(self) -> None:
        try:
            while self._take_in():
                outputs = self._engine.step()
                self._post(self._deliver, outputs, self._engine.load)
        except Exception as error:
            log.exception("the engine failed")
            self._failure = EngineStopped(f"a step failed: {error!r}")
            self._post(self._fail, self._failure)

    def _take_in(self) -> bool:
        """Carry out what was sent; wait for something if there is nothing to step. False: stop."""
        block = not self._engine.busy
        while True:
            try:
                command = self._inbox.get(block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = not self._engine.busy

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except Exception as error:
            self._post(self._put, request.id, error)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            log.warning("the event loop is gone; tokens are dropped")

    # ---- in the event loop

    def _deliver(self, outputs: list[Output], load: Load) -> None:
        self.load = load
        for output in outputs:
            self._put(output.request_id, output)

    def _put(self, request_id: str, item: Output | Exception) -> None:
        if stream := self._streams.get(request_id):
            stream.put_nowait(item)

    def _fail(self, error: Exception) -> None:
        for stream in self._streams.values():
            stream.put_nowait(error)
