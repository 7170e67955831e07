"""Records that must be there: each found, or refused with what would make it."""

from __future__ import annotations

from backpack_serving.errors import DataLoss, NotFound
from backpack_serving.interventions.records import Blob, Channel, Key, Patch, Release, Revision, Tenant
from backpack_serving.interventions.store import Read


def tenant(tx: Read, tenant: str) -> Tenant:
    if found := tx.get(Tenant, tenant):
        return found
    raise NotFound("NO_SUCH_TENANT", f"tenants/{tenant} doesn't exist", tenant=tenant)


def key(tx: Read, tenant: str, name: str) -> Key:
    if found := tx.get(Key, tenant, name):
        return found
    raise NotFound("NO_SUCH_KEY", f"tenants/{tenant}/keys/{name} doesn't exist")


def patch(tx: Read, tenant: str, name: str, deleted: bool = False) -> Patch:
    """One that isn't deleted, unless those count, too."""
    found = tx.get(Patch, tenant, name)
    if found and (deleted or not found.deleted):
        return found
    if found:
        raise NotFound("PATCH_DELETED", f"{found.name} is deleted; its name is never used again: take another one")
    raise NotFound("NO_SUCH_PATCH", f"tenants/{tenant}/patches/{name} doesn't exist; create the patch first")


def revision(tx: Read, tenant: str, name: str, number: int) -> Revision:
    if found := tx.get(Revision, tenant, name, number):
        return found
    raise NotFound("NO_SUCH_REVISION", f"tenants/{tenant}/patches/{name}/revisions/{number} doesn't exist")


def blob(tx: Read, record: Revision) -> Blob:
    """The bytes of a revision. Raises DataLoss if they aren't what was stored."""
    found = tx.get(Blob, record.tenant, record.digest)
    if found is None or not found.intact:
        what = "are gone" if found is None else "have changed"
        raise DataLoss("WRONG_DIGEST", f"the bytes of {record.name} {what}: restore the database from a backup")
    return found


def release(tx: Read, tenant: str, number: int) -> Release:
    if found := tx.get(Release, tenant, number):
        return found
    raise NotFound("NO_SUCH_RELEASE", f"tenants/{tenant}/releases/{number} doesn't exist")


def channel(tx: Read, tenant: str, name: str) -> Channel:
    if found := tx.get(Channel, tenant, name):
        return found
    raise NotFound("NO_SUCH_CHANNEL", f"tenants/{tenant}/channels/{name} doesn't exist; activate a release on it")


def latest(tx: Read, record: Patch) -> int:
    last = tx.list(Revision, record.tenant, record.patch, limit=1, descending=True)
    return last[0].number if last else 0
