"""Certificates, keys and authorities, as files that may be replaced while servers run."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

import structlog

log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tls:
    """Where the files are. A listener needs `certificate` and `key`; a channel needs `authorities`.

    With `client_authorities`, listeners take only clients with a certificate by one of them. `name` is what the
    certificates of other parts are checked for where they are called by address.
    """

    certificate: Path | None = None
    key: Path | None = None
    client_authorities: Path | None = None
    authorities: Path | None = None
    name: str = ""

    def identity(self) -> tuple[bytes, bytes] | None:
        """(key, certificate chain) as PEM, or None. Raises ValueError if they can't be read, don't fit or have
        expired: nobody would take them."""
        if self.certificate is None or self.key is None:
            return None
        try:
            found = self.key.read_bytes(), self.certificate.read_bytes()  # of what isn't there, ssl tells no name
            # With no passphrase given, ssl would ask whoever has the terminal, and everybody would wait.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
        except ssl.SSLError as error:
            raise ValueError(
                f"TLS: {self.certificate} and {self.key}: {error}; they must be PEM, belong together, and the key "
                "be without a passphrase"
            ) from None
        except OSError as error:
            raise ValueError(f"TLS: {error.filename}: {error.strerror}") from None
        from cryptography import x509  # clients without TLS don't wait for it

        until = x509.load_pem_x509_certificate(found[1]).not_valid_after_utc
        if until < datetime.now(UTC):
            raise ValueError(f"TLS: {self.certificate} expired on {until:%Y-%m-%d at %H:%M} UTC; put a new one there")
        return found

    def clients(self) -> bytes | None:
        """The authorities of clients as PEM. Raises ValueError if the file can't be read."""
        return _authorities(self.client_authorities)

    def servers(self) -> bytes | None:
        """The authorities of the servers that are called."""
        return _authorities(self.authorities)

    def stamp(self) -> tuple[int, ...]:
        """Changes whenever one of the listener's files does."""
        return tuple(_modification_times(self.certificate, self.key, self.client_authorities))


class Reloaded(Generic[T]):
    """What a listener makes of its files, made anew when they change.

    Raises what `make` does if the files aren't good now; later that is logged, and what was made before serves on.
    """

    def __init__(self, tls: Tls, make: Callable[[Tls], T]) -> None:
        self._tls, self._make = tls, make
        self._stamp, self._made = tls.stamp(), make(tls)
        self._refused: tuple[int, ...] = ()

    def now(self) -> T:
        """What the files give now: the same object as before, unless they have changed."""
        if (stamp := self._tls.stamp()) != self._stamp:
            try:
                self._made, self._stamp = self._make(self._tls), stamp
                log.info("certificates read again", certificate=str(self._tls.certificate))
            except (OSError, ValueError) as error:
                if stamp != self._refused:  # once: every handshake looks
                    log.error("certificates not read; the ones before serve on", reason=str(error))
                self._refused = stamp
        return self._made


def listener_context(tls: Tls) -> ssl.SSLContext:
    """The context of a listener that isn't gRPC's. Raises ValueError if the files aren't good."""
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
    except OSError as error:  # of ssl, too
        raise ValueError(f"TLS: {file} has no authorities: {error}") from None
    return file.read_bytes()


def _modification_times(*files: Path | None) -> Iterator[int]:
    for file in files:
        try:
            yield file.stat().st_mtime_ns if file else 0
        except OSError:
            yield 0
