"""Asks an HTTP server whether it serves, for a container's health check. Loads nothing that only servers need."""

from __future__ import annotations

import json
import socket
import ssl
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

from backpack_serving.auth.tls import Tls
from backpack_serving.errors import Unavailable


def ready(url: str, seconds: float, tls: Tls) -> tuple[bool, str]:
    """Whether the server at http://host:port or https://host:port serves, and what it says.

    Raises Unavailable if nobody answers, ValueError if the URL is none.
    """
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError(f"{url}: write http://host:port, as in http://127.0.0.1:8480")
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    try:
        plain = socket.create_connection((parts.hostname, port), timeout=seconds)
        with closing(_secured(plain, tls, parts.hostname) if secure else plain) as connection:
            asking = HTTPConnection(parts.hostname, port)
            asking.sock = connection
            asking.request("GET", "/readyz")
            answer = json.loads(asking.getresponse().read(2**16))
            status, why = str(answer["status"]), str(answer.get("why", ""))
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        raise Unavailable("TRANSPORT", f"{error}") from None
    return status == "SERVING", f"{status}: {why}" if why else status


def _secured(plain: socket.socket, tls: Tls, host: str) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=tls.authorities)
    if tls.certificate:
        context.load_cert_chain(tls.certificate, tls.key)
    return context.wrap_socket(plain, server_hostname=tls.name or host)
