"""Checks a store: every digest, and the hash chain of events."""

from __future__ import annotations

from dataclasses import dataclass

from backpack_lm.patch import release_digest

from backpack_serving.errors import DataLoss
from backpack_serving.interventions import lookup
from backpack_serving.interventions.ledger import verify_chain
from backpack_serving.interventions.records import ReleaseRecord, RevisionRecord, TenantRecord
from backpack_serving.interventions.store import Read
from backpack_serving.references import Position


@dataclass(frozen=True, slots=True)
class Intact:
    """How much was checked, without an error."""

    position: Position
    entries: int
    revisions: int
    releases: int


def verify(tx: Read) -> Intact:
    """Check everything. Raises DataLoss, naming the first record that has changed."""
    entries, broken = verify_chain(tx)
    if broken is not None:
        raise DataLoss("BROKEN_CHAIN", f"the audit entry of revision {broken} isn't the one that was written")
    revisions = releases = 0
    for tenant in tx.list(TenantRecord):
        for release in tx.list(ReleaseRecord, tenant.tenant):
            check_release(tx, release)
            releases += 1
        for revision in tx.list(RevisionRecord, tenant.tenant):
            lookup.blob(tx, revision)
            revisions += 1
    return Intact(tx.position, entries, revisions, releases)


def check_release(tx: Read, release: ReleaseRecord) -> list[RevisionRecord]:
    """A release's revisions. Raises DataLoss if their digests don't give the release's digest."""
    revisions = [lookup.revision(tx, release.tenant, *part) for part in release.parts]
    found = release_digest([revision.digest for revision in revisions])
    if found != release.digest:
        raise DataLoss("WRONG_DIGEST", f"{release.name} is stored as {found}, it was made as {release.digest}")
    return revisions
