"""What all clients have in common: a connection to a server, with an event loop or without one.

What a client does is written once, as coroutines that wait for a `Transport` and for nothing else. The blocking
transport has done its work when it is asked to, so coroutines over it never suspend: `run` starts one and has its
result. `blocking` makes a method of one, with the types of its arguments and its result.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from functools import wraps
from types import TracebackType
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar

from backpack_serving import rpc
from backpack_serving.auth.tls import Tls
from backpack_serving.errors import ServiceError, Unavailable

P = ParamSpec("P")
T = TypeVar("T")
C_co = TypeVar("C_co", bound="Connected", covariant=True)

PAGE = 1000
"""Records in one answer: the most that the service gives."""


class Transport(Protocol):
    """Carries calls out on a channel. `method` is a stub's; `how` is who calls, and for how long."""

    def __init__(self, address: str, tls: Tls | None) -> None: ...

    @property
    def channel(self) -> Any: ...

    async def unary(self, method: Any, request: Any, **how: Any) -> Any: ...

    def stream(self, method: Any, request: Any, **how: Any) -> AsyncGenerator[Any, None]:
        """Closing it ends the call."""

    async def sleep(self, seconds: float) -> None: ...

    async def close(self) -> None: ...


class OnLoop:
    """For asyncio. Made in the event loop that uses it."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self.channel: Any = rpc.channel(address, tls)

    async def unary(self, method: Any, request: Any, **how: Any) -> Any:
        return await method(request, **how)

    async def stream(self, method: Any, request: Any, **how: Any) -> AsyncGenerator[Any, None]:
        call = method(request, **how)
        try:
            async for message in call:
                yield message
        finally:
            call.cancel()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self.channel.close()


class Waiting:
    """For code without an event loop: none of these suspends. Safe to use from many threads."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self.channel: Any = rpc.sync_channel(address, tls)

    async def unary(self, method: Any, request: Any, **how: Any) -> Any:
        return method(request, **how)

    async def stream(self, method: Any, request: Any, **how: Any) -> AsyncGenerator[Any, None]:
        call = method(request, **how)
        try:
            for message in call:
                yield message
        finally:
            call.cancel()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def close(self) -> None:
        self.channel.close()


class Connected:
    """A client whose methods are coroutines."""

    def __init__(
        self,
        address: str,
        key: str | Callable[[], str] = "",
        *,
        tls: Tls | None = None,
        timeout: float | None = 60.0,
        attempts: int = 4,
        transport: type[Transport] = OnLoop,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts={attempts}; 1 for no second one, or more")
        self._transport = transport(address, tls)
        self._key, self._timeout, self._attempts = key, timeout, attempts

    async def close(self) -> None:
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _until(self, timeout: float | None) -> float:
        """The moment by which a call that begins now must have ended, with all its attempts."""
        seconds = self._timeout if timeout is None else timeout
        return math.inf if seconds is None else time.monotonic() + seconds

    def _how(self, until: float) -> dict[str, Any]:
        key = self._key if isinstance(self._key, str) else self._key()
        left = None if until == math.inf else max(0.0, until - time.monotonic())
        return {"metadata": rpc.with_key(key), "timeout": left}

    async def _once(self, method: Any, request: Any, until: float) -> Any:
        with rpc.errors():
            return await self._transport.unary(method, request, **self._how(until))

    async def _call(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        return await self._once(method, request, self._until(timeout))

    async def _repeated(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        """A call that may be made again, as often as `attempts` says, if nobody could be reached."""
        until = self._until(timeout)
        for attempt in range(self._attempts):
            try:
                return await self._once(method, request, until)
            except ServiceError as error:
                await self._pause(error, attempt, until)
        raise AssertionError("_pause raises after the last attempt")

    async def _write(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        """A call that changes something: its id makes it one change, however often it is sent."""
        request.request_id = new_id()
        return await self._repeated(method, request, timeout)

    async def _pages(self, method: Any, request: Any, field: str, limit: int | None = None) -> list[Any]:
        """What a list holds, page by page; no more than the limit."""
        found: list[Any] = []
        while limit is None or len(found) < limit:
            request.page_size = PAGE if limit is None else min(PAGE, limit - len(found))
            answer = await self._call(method, request)
            found += getattr(answer, field)
            request.page_token = answer.next_page_token
            if not request.page_token:
                break
        return found

    async def _pause(self, error: ServiceError, attempt: int, until: float) -> None:
        """Wait for the attempt after this one, counted from 0. Raises the error if there is none, or no time."""
        if not isinstance(error, Unavailable) or attempt + 1 >= self._attempts:
            raise error
        seconds = (error.retry_after or 0.0) + random.uniform(0, 0.1 * 2**attempt)
        if time.monotonic() + seconds >= until:
            raise error
        await self._transport.sleep(seconds)


class Blocking(Generic[C_co]):
    """A client whose methods block: each runs one of the coroutines of another client, of the type `ASYNC`."""

    ASYNC: ClassVar[type[Any]]

    def __init__(
        self,
        address: str,
        key: str | Callable[[], str] = "",
        *,
        tls: Tls | None = None,
        timeout: float | None = 60.0,
        attempts: int = 4,
    ) -> None:
        how: dict[str, Any] = {"tls": tls, "timeout": timeout, "attempts": attempts, "transport": Waiting}
        self._coroutines: C_co = self.ASYNC(address, key, **how)

    def close(self) -> None:
        run(self._coroutines.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def blocking(
    method: Callable[Concatenate[C_co, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Blocking[C_co], P], T]:
    """A coroutine of a client, as a method of its blocking twin."""

    @wraps(method)
    def call(self: Blocking[C_co], /, *args: P.args, **named: P.kwargs) -> T:
        return run(method(self._coroutines, *args, **named))

    return call


def blocking_stream(
    method: Callable[Concatenate[C_co, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Blocking[C_co], P], Iterator[T]]:
    """The same for a method whose results come one by one."""

    @wraps(method)
    def call(self: Blocking[C_co], /, *args: P.args, **named: P.kwargs) -> Iterator[T]:
        parts = method(self._coroutines, *args, **named)
        try:
            while True:
                yield run(anext(parts))
        except StopAsyncIteration:
            return
        finally:
            run(parts.aclose())

    return call


def new_id() -> str:
    return str(uuid.uuid4())


def run(work: Awaitable[T]) -> T:
    """The result of what never suspends."""
    try:
        work.__await__().send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a client's coroutine waits for nothing but its transport")
