"""The common part of all clients: a connection to a server, with an event loop or without one.

Clients are written once, as coroutines that await a `Transport` and nothing else. The blocking transport returns only
when its work is done, so coroutines over it never suspend: `run` starts one and returns its result. `blocking` turns
a coroutine into a blocking method with the same typed arguments and result.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import wraps
from types import TracebackType
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar

from backpack_serving import proxies, rpc
from backpack_serving.auth.tls import Tls
from backpack_serving.client import arguments
from backpack_serving.errors import InvalidRequest, ServiceError, Unavailable

P = ParamSpec("P")
T = TypeVar("T")
C_co = TypeVar("C_co", bound="Connected", covariant=True)

PAGE = 1000
"""Records in one page: the service's maximum."""

RETRY_WINDOW = 30.0
"""Seconds after its first failure in which a call is retried: a pod is replaced in less."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Longest pauses between attempts, in seconds: they double each time, up to gRPC's own reconnect pause."""

NOTICE = 1.0
"""Seconds without an answer after which `notice` is called."""

Notice = Callable[[ServiceError, float], None]
"""Called once for each retried call, with the error and the most seconds that retries may still take."""

log = logging.getLogger("backpack_serving.client")


class Transport(Protocol):
    """Makes calls on a channel. `method` is a stub's; `call_options` are gRPC's metadata and timeout."""

    def __init__(self, address: str, tls: Tls | None) -> None: ...

    @property
    def channel(self) -> Any: ...

    async def unary(self, method: Any, request: Any, **call_options: Any) -> Any: ...

    def stream(self, method: Any, request: Any, **call_options: Any) -> AsyncGenerator[Any, None]:
        """Closing it ends the call."""

    async def sleep(self, seconds: float) -> None: ...

    async def close(self) -> None: ...


class AsyncioTransport:
    """The transport for asyncio. Create it in the event loop that uses it."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self.channel: Any = rpc.channel(address, tls, client=True)

    async def unary(self, method: Any, request: Any, **call_options: Any) -> Any:
        return await method(request, **call_options)

    async def stream(self, method: Any, request: Any, **call_options: Any) -> AsyncGenerator[Any, None]:
        call = method(request, **call_options)
        try:
            async for message in call:
                yield message
        finally:
            call.cancel()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self.channel.close()


class BlockingTransport:
    """The blocking transport: none of its coroutines suspends. Thread-safe."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self.channel: Any = rpc.sync_channel(address, tls, client=True)

    async def unary(self, method: Any, request: Any, **call_options: Any) -> Any:
        return method(request, **call_options)

    async def stream(self, method: Any, request: Any, **call_options: Any) -> AsyncGenerator[Any, None]:
        call = method(request, **call_options)
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
    """A client whose methods are coroutines. Public methods of subclasses check their arguments (see `arguments`)."""

    def __init_subclass__(cls) -> None:
        for name, method in list(vars(cls).items()):
            if arguments.is_public(name, method):
                setattr(cls, name, arguments.checked(method))

    def __init__(
        self,
        address: str,
        key: str | Callable[[], str] = "",
        *,
        tls: Tls | None = None,
        timeout: float | None = 60.0,
        attempts: int | None = None,
        retry_window: float = RETRY_WINDOW,
        unreached_window: float | None = None,
        notice: Notice | None = None,
        transport: type[Transport] = AsyncioTransport,
    ) -> None:
        if attempts is not None and not 1 <= attempts < math.inf:
            raise ValueError(f"attempts={attempts}; 1 for no second one, or more; None for all that the window has")
        unreached = retry_window if unreached_window is None else unreached_window
        windows = {"retry_window": retry_window, "unreached_window": unreached}
        for name, value in (windows if timeout is None else {"timeout": timeout, **windows}).items():
            try:
                arguments.seconds(name, value)
            except InvalidRequest as error:
                raise ValueError(error.message) from None
        self._transport = transport(address, tls)
        self._proxy = proxies.of_target(address)
        self._address, self._key, self._timeout = address, key, timeout
        self._attempts, self._window, self._unreached = attempts, retry_window, unreached
        self._notice, self._reached = notice or self._log_failure, False

    async def close(self) -> None:
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _until(self, timeout: float | None) -> float:
        """The monotonic deadline of a call that begins now, with all its attempts."""
        seconds = self._timeout if timeout is None else timeout
        return math.inf if seconds is None else time.monotonic() + seconds

    def _call_options(self, until: float) -> dict[str, Any]:
        key = self._key if isinstance(self._key, str) else self._key()
        left = None if until == math.inf else max(0.0, until - time.monotonic())
        return {"metadata": rpc.with_key(key), "timeout": left}

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Calls inside the block raise ServiceErrors. Any answer shows that there is a server at the address."""
        try:
            with rpc.errors(self._proxy):
                yield
        except ServiceError as error:
            self._reached = self._reached or error.reason != "TRANSPORT"
            raise
        self._reached = True

    async def _once(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        """Make a call without retries."""
        with self._asking():
            return await self._transport.unary(method, request, **self._call_options(self._until(timeout)))

    async def _call(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        """Make a call, and retry it while the server is unavailable."""
        attempts = self._new_attempts(timeout)
        while True:
            try:
                with self._asking():
                    return await self._transport.unary(method, request, **self._call_options(attempts.until))
            except ServiceError as error:
                await attempts.another(error)

    async def _write(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        """Make a writing call. Its request id makes retries safe."""
        request.request_id = new_id()
        return await self._call(method, request, timeout)

    async def _pages(self, method: Any, request: Any, field: str, limit: int | None = None) -> list[Any]:
        """Collect the records of a list, page by page, up to the limit."""
        if limit is not None and (not isinstance(limit, int) or limit < 0):
            raise InvalidRequest.at("limit", "OUT_OF_RANGE", f"{limit!r}; write how many, or None for all")
        found: list[Any] = []
        while limit is None or len(found) < limit:
            request.page_size = PAGE if limit is None else min(PAGE, limit - len(found))
            answer = await self._call(method, request)
            found += getattr(answer, field)
            request.page_token = answer.next_page_token
            if not request.page_token:
                break
        return found

    def _new_attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self, self._until(timeout))

    def _log_failure(self, error: ServiceError, seconds: float) -> None:
        log.warning("%s: %s; trying again for %.0f s", self._address, error.message, seconds)


class Attempts:
    """The attempts at one call, until one succeeds, the deadline passes, or the client's retry window ends.

    The window is a time from the first failure, not a number of attempts, because servers are away for a time.
    """

    def __init__(self, client: Connected, until: float) -> None:
        self.until = until
        self._client = client
        self._failures, self._first, self._logged = 0, 0.0, False

    async def another(self, error: ServiceError) -> None:
        """Sleep until the next attempt: as long as the error says, plus full jitter, so that callers spread.

        Raises the error if it is permanent, or if no time is left for another attempt.
        """
        client, now = self._client, time.monotonic()
        self._first = self._first if self._failures else now
        self._failures += 1
        if not _is_transient(error) or self._failures == client._attempts:
            raise error
        unreached = error.reason == "TRANSPORT" and not client._reached
        end = min(self.until, self._first + (client._unreached if unreached else client._window))
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures - 1, 10))
        then = now + (error.retry_after or 0.0) + random.uniform(0, longest)
        if then >= end:
            raise error
        if then - self._first > NOTICE and not self._logged:
            self._logged = True
            client._notice(error, end - now)
        await client._transport.sleep(then - now)


def _is_transient(error: ServiceError) -> bool:
    """Whether a retry may succeed. A transport error without `retry_after` is permanent (see `rpc.status`)."""
    return isinstance(error, Unavailable) and (error.retry_after is not None or error.reason != "TRANSPORT")


class Blocking(Generic[C_co]):
    """A client whose methods block. Each runs a coroutine of the asynchronous client class `ASYNC`."""

    ASYNC: ClassVar[type[Any]]

    def __init__(
        self,
        address: str,
        key: str | Callable[[], str] = "",
        *,
        tls: Tls | None = None,
        timeout: float | None = 60.0,
        attempts: int | None = None,
        retry_window: float = RETRY_WINDOW,
        unreached_window: float | None = None,
        notice: Notice | None = None,
    ) -> None:
        call_options: dict[str, Any] = {
            "tls": tls,
            "timeout": timeout,
            "attempts": attempts,
            "transport": BlockingTransport,
        }
        call_options |= {"retry_window": retry_window, "unreached_window": unreached_window, "notice": notice}
        self._coroutines: C_co = self.ASYNC(address, key, **call_options)

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
    """Turn a client's coroutine into a method of its blocking twin."""

    @wraps(method)
    def call(self: Blocking[C_co], /, *args: P.args, **named: P.kwargs) -> T:
        return run(method(self._coroutines, *args, **named))

    return call


def blocking_stream(
    method: Callable[Concatenate[C_co, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Blocking[C_co], P], Iterator[T]]:
    """The same for a method that yields its results one by one."""

    @wraps(method)
    def call(self: Blocking[C_co], /, *args: P.args, **named: P.kwargs) -> Iterator[T]:
        return _drain(method(self._coroutines, *args, **named))  # checks the arguments now, not at the first `next`

    return call


def _drain(parts: AsyncGenerator[T, None]) -> Iterator[T]:
    """The results of an asynchronous generator that never suspends."""
    try:
        while True:
            yield run(anext(parts))
    except StopAsyncIteration:
        return
    finally:
        run(parts.aclose())


def new_id() -> str:
    return str(uuid.uuid4())


def run(work: Awaitable[T]) -> T:
    """The result of a coroutine that never suspends."""
    try:
        work.__await__().send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a client's coroutine waits for nothing but its transport")
