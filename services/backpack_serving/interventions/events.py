"""Reads the store's history: the audit trail for people, snapshots and events for readers."""

from __future__ import annotations

from backpack_serving.auth.keys import Principal, Role
from backpack_serving.interventions.ledger import verify_pages
from backpack_serving.interventions.records import ChannelRecord, EventRecord, KeyRecord, Record, TenantRecord
from backpack_serving.interventions.rules import RuleContext
from backpack_serving.references import Position


class EventRules:
    """Every write is one event: the audit entry and the change that readers follow."""

    def __init__(self, context: RuleContext) -> None:
        self._context = context

    def list_entries(self, who: Principal, after: int | None, limit: int) -> list[EventRecord]:
        """Newest first: the whole service's entries for an admin, its tenant's for an author."""
        _require_auditor(who)
        with self._context.read_as(who) as tx:
            return tx.list(EventRecord, after=after, limit=limit, descending=True)

    def verify_chain(self, who: Principal) -> tuple[int, int | None]:
        """The number of audit entries, and the revision of the first that breaks the chain, if any."""
        _require_auditor(who)
        return verify_pages(self._context.store.read)

    def position(self) -> Position:
        """The store's position."""
        with self._context.store.read() as tx:
            return tx.position

    def snapshot(self) -> tuple[Position, list[Record]]:
        """The store's position, and all records that readers need."""
        with self._context.store.read() as tx:
            records: list[Record] = [*tx.list(TenantRecord), *tx.list(KeyRecord), *tx.list(ChannelRecord)]
            return tx.position, records

    def events_after(self, revision: int, limit: int = 1000) -> tuple[Position, list[EventRecord]]:
        """The store's position, and the writes since a revision, oldest first."""
        with self._context.store.read() as tx:
            return tx.position, tx.list(EventRecord, after=revision, limit=limit)


def _require_auditor(who: Principal) -> None:
    if Role.ADMIN not in who.roles:
        who.require(Role.AUTHOR)
