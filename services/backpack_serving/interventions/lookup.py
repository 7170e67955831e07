"""Looks up records that must exist; raises NotFound with what would create them."""

from __future__ import annotations

from backpack_serving.errors import DataLoss, NotFound, release_deleted
from backpack_serving.interventions.records import (
    BlobRecord,
    ChannelRecord,
    KeyRecord,
    PatchRecord,
    ReleaseRecord,
    ReleaseStatusRecord,
    RevisionRecord,
    TenantRecord,
)
from backpack_serving.interventions.store import Read


def tenant(tx: Read, tenant: str) -> TenantRecord:
    if found := tx.get(TenantRecord, tenant):
        return found
    raise NotFound("NO_SUCH_TENANT", f"tenants/{tenant} doesn't exist", tenant=tenant)


def key(tx: Read, tenant: str, name: str) -> KeyRecord:
    if found := tx.get(KeyRecord, tenant, name):
        return found
    raise NotFound("NO_SUCH_KEY", f"tenants/{tenant}/keys/{name} doesn't exist")


def patch(tx: Read, tenant: str, name: str, deleted: bool = False) -> PatchRecord:
    """A patch that isn't deleted; with `deleted`, any."""
    found = tx.get(PatchRecord, tenant, name)
    if found and (deleted or not found.deleted):
        return found
    if found:
        raise NotFound("PATCH_DELETED", f"{found.name} is deleted; its name is never used again: take another one")
    raise NotFound("NO_SUCH_PATCH", f"tenants/{tenant}/patches/{name} doesn't exist; create the patch first")


def revision(tx: Read, tenant: str, name: str, number: int) -> RevisionRecord:
    if found := tx.get(RevisionRecord, tenant, name, number):
        return found
    raise NotFound("NO_SUCH_REVISION", f"tenants/{tenant}/patches/{name}/revisions/{number} doesn't exist")


def blob(tx: Read, record: RevisionRecord) -> BlobRecord:
    """The bytes of a revision. Raises DataLoss if they aren't what was stored."""
    found = tx.get(BlobRecord, record.tenant, record.digest)
    if found is None or not found.intact:
        what = "are gone" if found is None else "have changed"
        raise DataLoss("WRONG_DIGEST", f"the bytes of {record.name} {what}: restore the database from a backup")
    return found


def release(tx: Read, tenant: str, number: int, deleted: bool = False) -> ReleaseRecord:
    """A release that isn't deleted; with `deleted`, any."""
    found = tx.get(ReleaseRecord, tenant, number)
    if found is None:
        raise NotFound("NO_SUCH_RELEASE", f"tenants/{tenant}/releases/{number} doesn't exist")
    if not deleted and status(tx, tenant, number).deleted:
        raise release_deleted(found.name)
    return found


def status(tx: Read, tenant: str, number: int) -> ReleaseStatusRecord:
    """What became of a release: nothing yet, if there is no record of it."""
    return tx.get(ReleaseStatusRecord, tenant, number) or ReleaseStatusRecord(tenant, number)


def channel(tx: Read, tenant: str, name: str) -> ChannelRecord:
    if found := tx.get(ChannelRecord, tenant, name):
        return found
    raise NotFound("NO_SUCH_CHANNEL", f"tenants/{tenant}/channels/{name} doesn't exist; activate a release on it")


def latest(tx: Read, record: PatchRecord) -> int:
    last = tx.list(RevisionRecord, record.tenant, record.patch, limit=1, descending=True)
    return last[0].number if last else 0
