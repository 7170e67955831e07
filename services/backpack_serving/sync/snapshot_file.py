"""The last view, on disk, so that a process can start while the intervention service is down.

A file is written under another name, synced and renamed; then its folder is synced. The previous generation stays. A
file whose checksum doesn't match is never used: the previous generation is.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

_MAGIC = b"backpack.known-good.v1\n"


@dataclass(frozen=True, slots=True)
class SavedSnapshot:
    """A payload, and when it was last known to be complete (Unix time)."""

    payload: bytes
    fresh: float


def seal(payload: bytes) -> bytes:
    """The bytes of a file that keeps a payload: what it is, its checksum, the payload."""
    return _MAGIC + hashlib.sha256(payload).digest() + payload


def unseal(data: bytes) -> bytes | None:
    """The payload of such a file's bytes; None unless its checksum fits."""
    start = len(_MAGIC) + 32
    checksum, payload = data[len(_MAGIC) : start], data[start:]
    return payload if data.startswith(_MAGIC) and hashlib.sha256(payload).digest() == checksum else None


class SnapshotFile:
    """One payload on disk, in two generations."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before = path.with_name(path.name + ".before")

    def write(self, payload: bytes) -> None:
        """Write a payload durably. After a crash at any moment, this payload or the previous one is readable."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(seal(payload))
            file.flush()
            os.fsync(file.fileno())
        if self._payload(self.path) is not None:  # a damaged file must not replace a good previous generation
            self.path.replace(self._before)
        temporary.replace(self.path)
        _sync_folder(self.path.parent)

    def touch(self, fresh: float) -> None:
        """Set the time when the payload was last known to be complete. Not synced: a loss only makes it look older."""
        if self.path.exists():
            os.utime(self.path, (fresh, fresh))

    def read(self) -> SavedSnapshot | None:
        """The newest undamaged payload; None if there is none."""
        for path in (self.path, self._before):
            payload = self._payload(path)
            if payload is not None:
                return SavedSnapshot(payload, path.stat().st_mtime)
        return None

    def _payload(self, path: Path) -> bytes | None:
        """A file's payload; None if the file is missing, damaged or unreadable."""
        wrong = "its checksum doesn't fit"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            data, wrong = b"", str(error)
        payload = unseal(data)
        if payload is not None:
            return payload
        log.error("a known-good file is damaged; the one before it counts", file=str(path), wrong=wrong)
        return None


class BlobFolder:
    """Payloads on disk, named by the digest of their content."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, digest: str) -> bytes | None:
        saved = SnapshotFile(self._folder / digest).read()
        return saved.payload if saved else None

    def write(self, digest: str, payload: bytes) -> None:
        SnapshotFile(self._folder / digest).write(payload)

    def forget_all_but(self, digests: frozenset[str]) -> None:
        """Delete all other payloads."""
        for file in self._folder.glob("*") if self._folder.exists() else ():
            if file.name.split(".")[0] not in digests:
                file.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
