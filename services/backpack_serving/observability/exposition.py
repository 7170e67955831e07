"""The HTTP listener that Prometheus scrapes."""

from __future__ import annotations

import errno
import socket
import socketserver
import ssl
import sys
import threading
import time
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from backpack_serving.auth.tls import Reloaded, Tls, listener_context
from backpack_serving.settings import LAST_PORT, PORTS, ports_from

log = structlog.get_logger(__name__)

PAUSE = 0.1
"""Seconds before another connection is asked for when one couldn't be taken."""


class _Handler(WSGIRequestHandler):
    timeout = 10  # whoever connects and says nothing holds a thread no longer

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is no news."""


class _Server(ThreadingWSGIServer):
    """Wraps connections with the certificates as they are then: new ones need no restart."""

    context: Reloaded[ssl.SSLContext] | None = None

    def server_bind(self) -> None:
        """Without the base's question for this host's full name: a resolver that hangs would hold up the start."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def get_request(self) -> Any:
        try:
            connection, peer = super().get_request()
        except OSError:  # no descriptor is left: the connection waits, and to ask again at once takes a core
            time.sleep(PAUSE)
            raise
        if self.context is None:
            return connection, peer
        # Without the handshake, which the connection's own thread does: nobody waits for a slow client.
        context = self.context.now()
        return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), peer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever speaks no TLS, distrusts us or hangs up is no news; a traceback is for our own mistakes."""
        error = sys.exception()
        if not isinstance(error, OSError):
            log.error("a scrape failed", peer=str(client_address), exc_info=error)


class _Server6(_Server):
    address_family = socket.AF_INET6


def listen(registry: CollectorRegistry, address: str, tls: Tls | None = None) -> str:
    """Serve /metrics from a thread, for as long as the process lives; the address that it got.

    A port that is taken gives way to the next free one of sixteen: processes of one machine share a setting.
    Raises OSError if all are taken or there is no such host here, ValueError if the address is none or the
    certificates are no good.
    """
    context = Reloaded(tls, listener_context) if tls and tls.certificate else None
    host, _, first = address.rpartition(":")
    if not first.isdecimal() or int(first) > LAST_PORT:
        raise ValueError(f"can't serve metrics on {address!r}: give host:port, as in 127.0.0.1:9100 or [::]:9100")
    kind = _Server6 if host.startswith("[") else _Server
    for port in ports_from(int(first)):
        try:
            server = make_server(host.strip("[]"), port, make_wsgi_app(registry), kind, _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise OSError(f"can't serve metrics on {address} (BACKPACK_METRICS_ADDRESS): {error.strerror}") from None
        server.context = context
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        bound = f"{host}:{server.server_port}"
        log.info("metrics", address=f"{'https' if context else 'http'}://{bound}/metrics")
        return bound
    raise OSError(
        f"can't serve metrics on {address} (BACKPACK_METRICS_ADDRESS), nor on the {PORTS - 1} ports after it: all "
        "are taken"
    )
