"""The rules of releases: immutable lists of revisions, and their bytes for replicas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from backpack_lm import patch

from backpack_serving.auth.keys import Principal, Role
from backpack_serving.errors import InvalidRequest, NotFound, PreconditionFailed
from backpack_serving.interventions import lookup
from backpack_serving.interventions.integrity import check_release
from backpack_serving.interventions.ledger import IdempotencyKey, WriteResult
from backpack_serving.interventions.records import ChannelRecord, Record, ReleaseRecord, ReleaseStatusRecord
from backpack_serving.interventions.rules import RuleContext, check_text
from backpack_serving.interventions.store import Write
from backpack_serving.references import Position

MOST_RESOLVED = 256
"""Releases that a gateway may ask for at once: as many as one comparison may have."""


class ReleaseRules:
    """Releases of the calling tenant; for gateways and replicas, any tenant's."""

    def __init__(self, context: RuleContext) -> None:
        self._context = context

    def create_release(
        self, who: Principal, parts: Sequence[tuple[str, int]], notes: str, request: IdempotencyKey
    ) -> WriteResult[ReleaseRecord]:
        """A release of these (patch, revision number) pairs, in the order in which they apply."""
        who.require(Role.AUTHOR)
        check_text("notes", notes)
        self.check_parts(parts)

        def act(tx: Write, now: datetime) -> tuple[ReleaseRecord, list[Record]]:
            for name, _ in parts:
                lookup.patch(tx, who.tenant, name)
            found = [lookup.revision(tx, who.tenant, name, number) for name, number in parts]
            for record in found:
                self._context.check_model(record)
            last = tx.list(ReleaseRecord, who.tenant, limit=1, descending=True)
            digest = patch.release_digest([record.digest for record in found])
            listed = json.dumps([list(part) for part in parts])
            made = ReleaseRecord(who.tenant, last[0].number + 1, digest, listed, notes, now)
            tx.add(made)
            return made, [made]

        return self._context.ledger.write(who, "CreateRelease", request, act)

    def check_parts(self, parts: Sequence[object]) -> None:
        """Raises InvalidRequest for more revisions than go into a release, whatever they are."""
        if len(parts) > self._context.limits.revisions:
            raise InvalidRequest.at(
                "revisions", "TOO_MANY_REVISIONS", f"{len(parts)}, at most {self._context.limits.revisions}"
            )

    def get_release(self, who: Principal, number: int) -> tuple[ReleaseRecord, ReleaseStatusRecord]:
        """A release, also a deleted one, and what became of it."""
        who.require(Role.AUTHOR, Role.CALLER)  # a caller may name a release, too
        with self._context.read_as(who) as tx:
            found = lookup.release(tx, who.tenant, number, deleted=True)
            return found, lookup.status(tx, who.tenant, number)

    def list_releases(
        self, who: Principal, after: int | None, limit: int, deleted: bool = False
    ) -> list[tuple[ReleaseRecord, ReleaseStatusRecord]]:
        """Newest first, each with what became of it; with `deleted`, the deleted ones, too."""
        who.require(Role.AUTHOR)
        found: list[tuple[ReleaseRecord, ReleaseStatusRecord]] = []
        with self._context.read_as(who) as tx:
            while len(found) < limit:
                page = tx.list(ReleaseRecord, who.tenant, after=after, limit=limit, descending=True)
                known = tx.list(ReleaseStatusRecord, who.tenant, after=after, limit=limit, descending=True)
                statuses = {status.number: status for status in known}
                for record in page:
                    status = statuses.get(record.number) or ReleaseStatusRecord(record.tenant, record.number)
                    if deleted or not status.deleted:
                        found.append((record, status))
                if len(page) < limit:
                    break
                after = page[-1].number
            return found[:limit]

    def delete_release(self, who: Principal, number: int, request: IdempotencyKey) -> WriteResult[ReleaseRecord]:
        """Hide a release and refuse it from then on. Raises PreconditionFailed for one that a channel was ever at."""
        who.require(Role.AUTHOR)

        def act(tx: Write, now: datetime) -> tuple[ReleaseRecord, list[Record]]:
            found = lookup.release(tx, who.tenant, number)
            status = lookup.status(tx, who.tenant, number)
            # An old version of the service, beside this one or before a second upgrade, doesn't say what was served.
            at = (c for c in tx.list(ChannelRecord, who.tenant) if number in c.numbers)
            if status.served or not number or next(at, None):
                why = "a channel was at it, so it stays for the audit" if number else "it is the model unpatched"
                raise PreconditionFailed("RELEASE_SERVED", f"{found.name} can't be deleted: {why}")
            tx.replace(replace(status, deleted=True))
            return found, []

        return self._context.ledger.write(who, "DeleteRelease", request, act)

    def resolve_releases(
        self, who: Principal, tenant: str, numbers: Sequence[int]
    ) -> tuple[Position, list[ReleaseRecord]]:
        """A tenant's releases of these numbers, and where the store stood when they were read."""
        who.require(Role.REPLICA)
        if len(numbers) > MOST_RESOLVED:
            raise InvalidRequest.at("numbers", "TOO_MANY", f"{len(numbers)}; at most {MOST_RESOLVED}")
        with self._context.read_as(who) as tx:
            return tx.position, [lookup.release(tx, tenant, number) for number in numbers]

    def fetch_release(self, who: Principal, tenant: str, digest: str) -> list[bytes]:
        """Canonical bytes of a release's revisions, checked against their digests on the way out."""
        who.require(Role.REPLICA)
        with self._context.read_as(who) as tx:
            release = tx.find(ReleaseRecord, tenant=tenant, digest=digest)
            if release is None:
                raise NotFound("NO_SUCH_RELEASE", f"tenants/{tenant} has no release {digest}")
            return [lookup.blob(tx, revision).data for revision in check_release(tx, release)]
