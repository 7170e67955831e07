"""The store's history as changes for readers; implements `backpack_serving.sync.server.History`."""

from __future__ import annotations

import json
from typing import Any

from backpack_serving.interventions.records import (
    ChannelRecord,
    EventRecord,
    KeyRecord,
    Record,
    ReleaseRecord,
    TenantRecord,
    kind_name,
    record_from,
)
from backpack_serving.interventions.service import Interventions
from backpack_serving.references import Position
from backpack_serving.sync.server import HistoryPage
from backpack_serving.sync.state import RecentRelease, StateEntry, TenantState, UnknownEntry


class EventHistory:
    """Reads the events of an intervention service, a page at a time."""

    def __init__(self, service: Interventions, page: int = 1000) -> None:
        self._service, self._page = service, page

    @property
    def fingerprint(self) -> str:
        return self._service.shape.fingerprint

    @property
    def head(self) -> Position:
        return self._service.events.position()

    def at_hand(self, revision: int) -> bool:
        return False  # each answer is read from the store

    def snapshot(self, at_least: Position = Position()) -> HistoryPage:
        at, records = self._service.events.snapshot()
        return HistoryPage(at, at, tuple(map(_entry_of, records)))

    def since(self, revision: int) -> HistoryPage | None:
        head, writes = self.writes_after(revision)
        if writes is None:
            return None
        upto = Position(head.epoch, revision + len(writes))
        return HistoryPage(head, min(upto, head), tuple(entry for write in writes for entry in write))

    def writes_after(self, revision: int) -> tuple[Position, list[tuple[StateEntry, ...]] | None]:
        """The store's position, and the entries of each write after a revision, as many as a page has; None for the
        writes if some were compacted."""
        head, events = self._service.events.events_after(revision, self._page)
        if events and events[0].revision != revision + 1:
            return head, None
        return head, [_entries_of(event) for event in events]


def _entries_of(event: EventRecord) -> tuple[StateEntry, ...]:
    return tuple(_entry_from(values) for values in json.loads(event.changes))


def _entry_from(values: dict[str, Any]) -> StateEntry:
    record = record_from(values)
    return UnknownEntry(values["kind"]) if record is None else _entry_of(record)


def _entry_of(record: Record) -> StateEntry:
    """The entry of readers' state that a record becomes."""
    match record:
        case TenantRecord():
            return TenantState(record.tenant, record.suspended)
        case KeyRecord() | ChannelRecord():
            return record.state
        case ReleaseRecord():
            return RecentRelease(record.tenant, record.ref)
        case _:
            return UnknownEntry(kind_name(type(record)))
