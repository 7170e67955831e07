"""Checks that an address can be listened on, before gRPC tries, which would write to stderr on its own."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress

_EVERYWHERE = ("0.0.0.0", "::")


def check(address: str) -> None:
    """Raise OSError, with the reason, if a server can't listen on host:port or unix:path."""
    why = _unix(address.removeprefix("unix:")) if address.startswith("unix:") else _tcp(address)
    if why:
        raise unusable(address, why)


def unusable(address: str, why: str) -> OSError:
    """The error for an address that can't be listened on."""
    return OSError(
        f"can't listen on {address}: is another server there, or is it no address of this machine? ({why}) "
        "`backpack settings` lists who listens where"
    )


def _tcp(address: str) -> str:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        return str(error)
    reasons = [_bind(family, where, host in _EVERYWHERE) for family, _, _, _, where in found]
    taken = [why for why in reasons if why == _IN_USE]  # taken on one of a name's addresses: clients might use that one
    return (taken or [""])[0] if taken or not all(reasons) else reasons[0]


_IN_USE = "Address already in use"


def _bind(family: int, where: object, everywhere: bool) -> str:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # lingering connections are no server
            trial.bind(where)  # type: ignore[arg-type]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return _IN_USE
        # Without IPv6, gRPC listens on all of IPv4 instead.
        return "" if everywhere and error.errno != errno.EACCES else str(error.strerror)
    return ""


def _unix(path: str) -> str:
    """gRPC would replace an existing socket, even one that another server listens on."""
    with suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as trial:
        trial.settimeout(1)
        trial.connect(path.removeprefix("//"))
        return _IN_USE
    return ""
