"""The rules of patches and their revisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from backpack_lm.patch import Edit, PatchError
from backpack_lm.patch import RevisionContent as Content

from backpack_serving.auth.keys import Principal, Role
from backpack_serving.errors import AlreadyExists, from_patch_error
from backpack_serving.interventions import lookup
from backpack_serving.interventions.ledger import IdempotencyKey, WriteResult
from backpack_serving.interventions.records import BlobRecord, PatchRecord, Record, RevisionRecord, key_of
from backpack_serving.interventions.rules import RuleContext, check_id, check_text
from backpack_serving.interventions.store import Read, Write


class PatchRules:
    """Named patches and their immutable revisions, of the calling tenant."""

    def __init__(self, context: RuleContext) -> None:
        self._context = context

    def create_patch(
        self, who: Principal, name: str, description: str, request: IdempotencyKey
    ) -> WriteResult[PatchRecord]:
        """Create a patch. Raises AlreadyExists if the name is taken, even by a deleted patch."""
        who.require(Role.AUTHOR)
        check_id("patch_id", name)
        check_text("description", description)

        def act(tx: Write, now: datetime) -> tuple[PatchRecord, list[Record]]:
            made = PatchRecord(who.tenant, name, description, now)
            if tx.get(PatchRecord, who.tenant, name):
                raise AlreadyExists("PATCH_EXISTS", f"{made.name} exists already; add a revision to it")
            tx.add(made)
            return made, []

        return self._context.ledger.write(who, "CreatePatch", request, act)

    def get_patch(self, who: Principal, name: str, deleted: bool = False) -> tuple[PatchRecord, int]:
        """A patch with the number of its newest revision; a deleted one if asked for."""
        who.require(Role.AUTHOR)
        with self._context.read_as(who) as tx:
            record = lookup.patch(tx, who.tenant, name, deleted)
            return record, lookup.latest(tx, record)

    def newest_revision(self, who: Principal, patch: PatchRecord) -> int:
        """The number of a patch's newest revision, or 0; also for a deleted patch."""
        with self._context.read_as(who) as tx:
            return lookup.latest(tx, patch)

    def list_patches(
        self, who: Principal, after: str | None, limit: int, deleted: bool = False
    ) -> list[tuple[PatchRecord, int]]:
        """Patches with the number of each one's newest revision; deleted ones, too, if asked for."""
        who.require(Role.AUTHOR)
        found: list[PatchRecord] = []
        with self._context.read_as(who) as tx:
            while len(found) < limit and (page := tx.list(PatchRecord, who.tenant, after=after, limit=limit)):
                after = page[-1].patch
                found += [record for record in page if deleted or not record.deleted]
            return [(record, lookup.latest(tx, record)) for record in found[:limit]]

    def describe_patch(
        self, who: Principal, name: str, description: str, request: IdempotencyKey
    ) -> WriteResult[PatchRecord]:
        who.require(Role.AUTHOR)
        check_text("patch.description", description)

        def act(tx: Write, now: datetime) -> tuple[PatchRecord, list[Record]]:
            made = replace(lookup.patch(tx, who.tenant, name), description=description)
            tx.replace(made)
            return made, []

        return self._context.ledger.write(who, "UpdatePatch", request, act)

    def delete_patch(self, who: Principal, name: str, request: IdempotencyKey) -> WriteResult[PatchRecord]:
        """Hide a patch and refuse new revisions of it. Releases keep theirs."""
        who.require(Role.AUTHOR)

        def act(tx: Write, now: datetime) -> tuple[PatchRecord, list[Record]]:
            made = replace(lookup.patch(tx, who.tenant, name), deleted=True)
            tx.replace(made)
            return made, []

        return self._context.ledger.write(who, "DeletePatch", request, act)

    def draft_revision(self, who: Principal, name: str, edits: Sequence[Edit]) -> RevisionRecord:
        """What `create_revision` would store, after all its checks. Stores nothing. Raises as that does, and
        InvalidRequest for a name that no patch may be made with.
        """
        who.require(Role.AUTHOR)
        check_id("parent", name)
        blob = self._blob(who, edits)
        with self._context.read_as(who) as tx:
            return self._revision(tx, name, blob, self._context.now())

    def create_revision(
        self, who: Principal, name: str, edits: Sequence[Edit], request: IdempotencyKey
    ) -> WriteResult[RevisionRecord]:
        """The next revision of a patch.

        Raises InvalidRequest, with everything that is wrong, for edits that this model can't have, and NotFound if
        there is no such patch.
        """
        who.require(Role.AUTHOR)
        blob = self._blob(who, edits)

        def act(tx: Write, now: datetime) -> tuple[RevisionRecord, list[Record]]:
            made = self._revision(tx, name, blob, now)
            if tx.get(BlobRecord, *key_of(blob)) is None:
                tx.add(blob)
            tx.add(made)
            return made, []

        return self._context.ledger.write(who, "CreateRevision", request, act)

    def get_revision(self, who: Principal, name: str, number: int) -> tuple[RevisionRecord, Sequence[Edit]]:
        """A revision and its edits, after its bytes were checked against its digest."""
        who.require(Role.AUTHOR)
        with self._context.read_as(who) as tx:
            record = lookup.revision(tx, who.tenant, name, number)
            return record, Content.from_bytes(lookup.blob(tx, record).data).edits

    def list_revisions(self, who: Principal, name: str, after: int | None, limit: int) -> list[RevisionRecord]:
        who.require(Role.AUTHOR)
        with self._context.read_as(who) as tx:
            lookup.patch(tx, who.tenant, name)
            return tx.list(RevisionRecord, who.tenant, name, after=after, limit=limit)

    def _blob(self, who: Principal, edits: Sequence[Edit]) -> BlobRecord:
        made = Content(self._context.shape.fingerprint, tuple(edits))
        try:
            made.validate(self._context.shape, self._context.limits)
        except PatchError as error:
            raise from_patch_error(error) from None
        return BlobRecord(who.tenant, made.digest, made.to_bytes())

    def _revision(self, tx: Read, name: str, blob: BlobRecord, now: datetime) -> RevisionRecord:
        number = lookup.latest(tx, lookup.patch(tx, blob.tenant, name)) + 1
        return RevisionRecord(blob.tenant, name, number, blob.digest, self._context.shape.fingerprint, now)
