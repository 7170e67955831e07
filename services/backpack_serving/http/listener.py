"""Listens for HTTP with uvicorn, on the event loop of whoever starts it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from uvicorn import Config
from uvicorn import Server as Uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from backpack_serving import rpc, tasks
from backpack_serving.auth.tls import Reloaded, Tls, listener_context
from backpack_serving.http.calls import Calls

HEAD_BYTES = 32 * 2**10
"""Most bytes of a request's line and headers; a token of an issuer may take some."""

HEAD_SECONDS = 10.0
"""Whoever connects has so long to send them."""

IDLE_SECONDS = 75
"""A connection without a request is kept open so long, longer than load balancers do."""

_ENDING = 5.0
"""Seconds that cancelled requests have to say so after the grace period."""


class _Protocol(HttpToolsProtocol):
    """uvicorn's, which bounds neither the size of headers nor the time that they take."""

    _head = _fields = 0
    _in_head = True
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_SECONDS, self._close_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head += len(data)
            if self._late is None:  # of a further request
                self._late = self.loop.call_later(HEAD_SECONDS, self._close_late)
        super().data_received(data)
        if self._in_head and self._head > HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        self._fields = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += len(name) + len(value)
        if self._fields > HEAD_BYTES:  # trailers after a body are fields, too
            raise ValueError("too many bytes of fields")  # the parser's caller answers 400 and closes
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head = False, 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close_late(self) -> None:
        self._late = None
        self.transport.close()


_TOO_LARGE_BODY = b'{"error":{"message":"the headers have more than %d bytes","code":"HEADERS_TOO_LARGE"}}' % HEAD_BYTES
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_TOO_LARGE_BODY), _TOO_LARGE_BODY)
)


class _EmbeddedServer(Uvicorn):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the command's: see cli/stopping.py."""
        yield


@dataclass(frozen=True, slots=True)
class Listener:
    """A server that listens."""

    address: str
    calls: Calls
    server: Uvicorn
    serving: asyncio.Task[None]

    async def stop(self, grace: float) -> None:
        """Drain: refuse new requests, let running ones finish for `grace` seconds, tell the rest to try again."""
        self.calls.draining = self.server.should_exit = True
        await self.calls.idle(grace)
        self.calls.end()
        await self.calls.idle(_ENDING)
        self.server.force_exit = True
        await asyncio.wait({self.serving}, timeout=_ENDING)  # a client that reads nothing isn't waited for
        await tasks.end(self.serving)


async def listen(calls: Calls, address: str, tls: Tls) -> Listener:
    """Serve on host:port (port 0: a free one), with TLS if there is a certificate.

    Raises OSError if the address is taken, ValueError if the certificates are no good.
    """
    await asyncio.to_thread(rpc.check_address, address)
    context = Reloaded(tls, listener_context) if tls.certificate else None
    sockets = await asyncio.to_thread(_bind_all, address)
    more: dict[str, Any] = {"ssl_context_factory": lambda *_: _renewing(context)} if context else {}
    config = Config(
        calls,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        **more,
    )
    server = _EmbeddedServer(config)
    serving = asyncio.create_task(server.serve(sockets))
    while not server.started and not serving.done():
        await asyncio.sleep(0.001)
    if serving.done():
        serving.result()
    port = sockets[0].getsockname()[1]
    return Listener(f"{address.rpartition(':')[0]}:{port}", calls, server, serving)


def _renewing(certificates: Reloaded[ssl.SSLContext]) -> ssl.SSLContext:
    """A context whose handshakes use the certificates as they are then: new ones need no restart."""
    first = certificates.now()

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = certificates.now()

    first.sni_callback = choose
    return first


def _bind_all(address: str) -> list[socket.socket]:
    """Sockets on all addresses of a host. Raises OSError."""
    host, _, port = address.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    for family, _, _, _, where in dict.fromkeys(found):
        free = sockets[0].getsockname()[1] if sockets else int(port)  # all of them on the same
        both = family == socket.AF_INET6 and where[0] == "::"
        sockets.append(socket.create_server((str(where[0]), free), family=family, backlog=2048, dualstack_ipv6=both))
    return sockets
