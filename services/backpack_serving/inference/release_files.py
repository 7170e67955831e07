"""The revisions of releases on a replica's disk, by the release's digest."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path

import structlog
from backpack_lm.patch import release_digest

from backpack_serving.errors import DataLoss
from backpack_serving.sync.snapshot_file import BlobFolder

log = structlog.get_logger(__name__)

_COUNT = struct.Struct("<I")


class ReleaseFiles:
    """Each release in one file. One that is damaged, another's or can't be read counts as missing."""

    def __init__(self, folder: Path) -> None:
        self._blobs = BlobFolder(folder)

    def has(self, digest: str) -> bool:
        return self.read(digest) is not None

    def read(self, digest: str) -> list[bytes] | None:
        """The canonical bytes of its revisions, in their order; None if it isn't there."""
        packed = self._blobs.read(digest)
        if packed is None:
            return None
        revisions, at = [], 0
        while at + _COUNT.size <= len(packed):
            (size,) = _COUNT.unpack_from(packed, at)
            at += _COUNT.size
            revisions.append(packed[at : at + size])
            at += size
        if digest_of(revisions) != digest:
            log.error("the file of a release holds another; it counts as missing", digest=digest)
            return None
        return revisions

    def write(self, digest: str, revisions: list[bytes]) -> None:
        self._blobs.write(digest, b"".join(_COUNT.pack(len(data)) + data for data in revisions))

    def forget_all_but(self, digests: frozenset[str]) -> None:
        self._blobs.forget_all_but(digests)


def check_digest(revisions: Iterable[bytes], digest: str) -> None:
    """Raise DataLoss unless these are the canonical bytes of the release with this digest."""
    found = digest_of(revisions)
    if found != digest:
        message = f"asked for release {digest}, got the bytes of {found}"
        raise DataLoss("WRONG_DIGEST", message, wanted=digest, got=found)


def digest_of(revisions: Iterable[bytes]) -> str:
    """The digest of the release of revisions with these canonical bytes."""
    return release_digest([hashlib.sha256(data).hexdigest() for data in revisions])
