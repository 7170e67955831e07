"""Every request: its id, its span, its metrics and log line; its errors; who leaves, and what a drain ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from backpack_serving import rpc, tasks
from backpack_serving.errors import InvalidRequest, NotFound, ServiceError
from backpack_serving.http import refusals
from backpack_serving.observability import tracing

log = structlog.get_logger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

QUIET = frozenset({"/healthz", "/readyz"})
"""Paths that are neither counted, logged nor refused: probes ask them for ever."""

_READABLE = ("x-request-id", "retry-after", "backpack-reason", "grpc-status", "grpc-message")
"""Headers of answers that pages of other origins may read."""


@dataclass(slots=True, eq=False)
class HttpCall:
    """One request. `left`: its client has gone; `ended`: our drain ended it."""

    task: asyncio.Task[Any]
    code: str = "OK"
    reason: str = ""
    started: bool = False
    complete: bool = False
    left: bool = False
    ended: bool = False

    def refused(self, error: ServiceError) -> None:
        """Note the error that it ends with."""
        self.code, self.reason = error.code, error.reason

    def drained(self) -> ServiceError:
        """The error of a call that the drain has ended. Call it where its cancellation was caught."""
        self.task.uncancel()
        error = rpc.draining()
        self.refused(error)
        return error


_current: ContextVar[HttpCall] = ContextVar("call")


def current() -> HttpCall:
    """The request that this code runs for."""
    return _current.get()


class Calls:
    """An ASGI application around another.

    `name` gives the method of a path, of few that there are. Pages of `origins` may call ("*": all pages).
    """

    def __init__(self, app: App, watcher: rpc.Watcher, name: Callable[[str], str], origins: Collection[str]) -> None:
        self._inner, self._watcher, self._name = app, watcher, name
        self._app: App = self._answered
        if origins:
            self._app = CORSMiddleware(
                self._answered,
                allow_origins=sorted(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=_READABLE,
            )
        self._running: set[HttpCall] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in QUIET:
            await self._inner(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = rpc.identify(headers)
        structlog.contextvars.bind_contextvars(request_id=request_id)
        task = asyncio.current_task()
        assert task is not None, "servers run each request in a task"
        call = HttpCall(task)
        _current.set(call)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.started = True
                if message["status"] >= 400 and call.code == "OK":  # what Connect's own rules refuse
                    call.refused(InvalidRequest("NOT_THE_PROTOCOL", f"HTTP {message['status']}"))
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                call.complete = True
            await send(message)

        name = self._name(scope["path"])
        with tracing.served(name, headers):
            await self._run(call, name, scope, receive, answer)

    async def _run(self, call: HttpCall, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        began, body = time.perf_counter(), _Body(call, receive)
        self._running.add(call)
        self._idle.clear()
        self._watcher.began(name)
        try:
            await self._app(scope, body, send)
        except asyncio.CancelledError:
            if not call.left:
                raise
            call.task.uncancel()
            call.code = call.reason = "CANCELLED"
        finally:
            await body.close()
            self._running.discard(call)
            if not self._running:
                self._idle.set()
            seconds = time.perf_counter() - began
            self._watcher.ended(name, call.code, call.reason, seconds)
            log.info("call", method=name, code=call.code, reason=call.reason, seconds=round(seconds, 4))

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; its error is an answer, if nothing was answered yet."""
        call = current()
        try:
            if self.draining:
                raise rpc.draining()
            scope["app"] = self  # without it, starlette would answer in its own words
            await self._inner(scope, receive, send)
            return
        except asyncio.CancelledError:
            if not call.ended:
                raise
            refusal = call.drained()
        except HTTPException as error:
            refusal = _no_route(error, scope["path"])
        except Exception as error:
            refusal = rpc.refusal_of(error, scope["path"])
            refusal.__traceback__ = None  # a reference cycle, which would keep the request in memory
        call.refused(refusal)
        if not call.started:
            await refusals.response(refusal)(scope, receive, send)
        # Otherwise uvicorn closes the connection, as the answer isn't complete.

    async def idle(self, seconds: float) -> None:
        """Wait until nothing runs, for at most so many seconds."""
        await rpc.wait_at_most(self._idle, seconds)

    def end(self) -> None:
        """Cancel what still runs; clients are told to try again."""
        for call in self._running:
            call.ended = True
            call.task.cancel()


def _no_route(error: HTTPException, path: str) -> ServiceError:
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return InvalidRequest("METHOD_NOT_ALLOWED", f"{path} takes {allowed}", allow=allowed)
    return NotFound("NO_SUCH_PATH", f"there is no {path}; /openapi.json lists what there is")


class _Body:
    """The request's body; once it is read, a client that leaves cancels the request, and with it its calls."""

    def __init__(self, call: HttpCall, receive: Receive) -> None:
        self._call, self._receive = call, receive
        self._watching: asyncio.Task[None] | None = None

    async def __call__(self) -> Message:
        if self._watching is not None:
            await asyncio.Event().wait()  # whoever asks learns of it by being cancelled
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._call.left = True
            raise asyncio.CancelledError
        if not message.get("more_body", False):
            self._watching = asyncio.create_task(self._watch())
        return message

    async def _watch(self) -> None:
        await self._receive()
        if not self._call.complete:  # the end of a complete answer is told alike
            self._call.left = True
            self._call.task.cancel()

    async def close(self) -> None:
        if self._watching is not None:
            await tasks.end(self._watching)
