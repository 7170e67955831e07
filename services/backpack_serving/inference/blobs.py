"""The revisions of releases on a replica's disk, by the release's digest."""

from __future__ import annotations

import struct
from pathlib import Path

from backpack_serving.sync.known_good import Blobs

_COUNT = struct.Struct("<I")


class ReleaseBlobs:
    """Each release in one file. Who reads it verifies it against the digest.

    One that is damaged, or can't be read, counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self._blobs = Blobs(folder)

    def has(self, digest: str) -> bool:
        return self._blobs.read(digest) is not None

    def read(self, digest: str) -> list[bytes] | None:
        """The canonical bytes of its revisions, in their order; None if it isn't there."""
        packed = self._blobs.read(digest)
        if packed is None:
            return None
        revisions, at = [], 0
        while at < len(packed):
            (size,) = _COUNT.unpack_from(packed, at)
            at += _COUNT.size
            revisions.append(packed[at : at + size])
            at += size
        return revisions

    def write(self, digest: str, revisions: list[bytes]) -> None:
        self._blobs.write(digest, b"".join(_COUNT.pack(len(data)) + data for data in revisions))

    def forget_all_but(self, digests: frozenset[str]) -> None:
        self._blobs.forget_all_but(digests)
