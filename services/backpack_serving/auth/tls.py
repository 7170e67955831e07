"""TLS files (certificates, keys, authorities), reloaded when they change."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

import structlog

log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of the files. A listener needs `certificate` and `key`; a channel needs `authorities`.

    With `client_authorities`, listeners accept only clients with a certificate of one of them. `name` is the host
    name expected in the certificates of servers that are called by IP address.
    """

    certificate: Path | None = None
    key: Path | None = None
    client_authorities: Path | None = None
    authorities: Path | None = None
    name: str = ""

    def identity(self) -> tuple[bytes, bytes] | None:
        """(key, certificate chain) as PEM, or None. Raises ValueError if they are unreadable, mismatched or expired."""
        if self.certificate is None or self.key is None:
            return None
        try:
            found = self.key.read_bytes(), self.certificate.read_bytes()  # ssl would not name a missing file
            # Without a password, ssl would prompt on the terminal and block.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
        except ssl.SSLError as error:
            raise ValueError(
                f"TLS: {self.certificate} and {self.key}: {error}; they must be PEM, belong together, and the key "
                "be without a passphrase"
            ) from None
        except OSError as error:
            raise ValueError(f"TLS: {error.filename}: {error.strerror}") from None
        from cryptography import x509  # a slow import that clients without TLS don't need

        until = x509.load_pem_x509_certificate(found[1]).not_valid_after_utc
        if until < datetime.now(UTC):
            raise ValueError(f"TLS: {self.certificate} expired on {until:%Y-%m-%d at %H:%M} UTC; put a new one there")
        return found

    def clients(self) -> bytes | None:
        """The authorities for client certificates, as PEM. Raises ValueError if the file is unreadable."""
        return _authorities(self.client_authorities)

    def servers(self) -> bytes | None:
        """The authorities for the servers that we call, as PEM. Raises ValueError if the file is unreadable."""
        return _authorities(self.authorities)

    def stamp(self) -> tuple[int, ...]:
        """The modification times of the listener's files."""
        return tuple(map(modification_time, (self.certificate, self.key, self.client_authorities)))


class Reloaded(Generic[T]):
    """An object built from a listener's TLS files, rebuilt when they change.

    The constructor raises the errors of `make`. Later ones are logged, and the previous object stays in use.
    """

    def __init__(self, tls: Tls, make: Callable[[Tls], T]) -> None:
        self._tls, self._make = tls, make
        self._stamp, self._made = tls.stamp(), make(tls)
        self._refused: tuple[int, ...] = ()

    def now(self) -> T:
        """The current object: rebuilt if the files have changed."""
        if (stamp := self._tls.stamp()) != self._stamp:
            try:
                self._made, self._stamp = self._make(self._tls), stamp
                log.info("certificates read again", certificate=str(self._tls.certificate))
            except (OSError, ValueError) as error:
                if stamp != self._refused:  # log once: every handshake calls this
                    log.error("certificates not read; the ones before serve on", reason=str(error))
                self._refused = stamp
        return self._made


def listener_context(tls: Tls) -> ssl.SSLContext:
    """The SSL context of a listener other than gRPC's. Raises ValueError if the files are invalid."""
    assert tls.certificate, "asked for by listeners only"
    tls.identity()
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.load_cert_chain(tls.certificate, tls.key)
    if tls.clients():
        made.verify_mode = ssl.CERT_REQUIRED
        made.load_verify_locations(tls.client_authorities)
    return made


def _authorities(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except OSError as error:  # SSLError is one, too
        raise ValueError(f"TLS: {file} has no authorities: {error}") from None
    return file.read_bytes()


def modification_time(file: Path | None) -> int:
    """A file's modification time in nanoseconds; 0 if it doesn't exist."""
    try:
        return file.stat().st_mtime_ns if file else 0
    except OSError:
        return 0
