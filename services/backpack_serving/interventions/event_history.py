"""The store's history, as readers are told it: `backpack_serving.sync.server.Log`."""

from __future__ import annotations

import json
from typing import Any

from backpack_serving.auth.keys import Principal, Role, Verifier
from backpack_serving.interventions.records import EventRecord, Position, visible
from backpack_serving.interventions.service import Interventions
from backpack_serving.sync.server import HistoryPage
from backpack_serving.sync.state import (
    CanarySplit,
    ChannelState,
    KeyState,
    RecentRelease,
    ReleaseRef,
    StateEntry,
    TenantState,
    UnknownEntry,
)


class EventHistory:
    """Reads the events of an intervention service, so many at a time."""

    def __init__(self, service: Interventions, page: int = 1000) -> None:
        self._service, self._page = service, page

    @property
    def fingerprint(self) -> str:
        return self._service.shape.fingerprint

    def snapshot(self) -> HistoryPage:
        at, records = self._service.snapshot()
        return HistoryPage(at, at, tuple(_entry_of(visible(record)) for record in records))

    def since(self, revision: int) -> HistoryPage | None:
        head, events = self._service.events_after(revision, self._page)
        if events and events[0].revision != revision + 1:
            return None
        upto = Position(head.epoch, events[-1].revision if events else revision)
        return HistoryPage(head, min(upto, head), tuple(change for event in events for change in _entries_of(event)))


def _entries_of(event: EventRecord) -> list[StateEntry]:
    return [_entry_of(values) for values in json.loads(event.changes)]


def _entry_of(values: dict[str, Any]) -> StateEntry:
    """A record as an event tells it. Fields that older events lack have the meaning that they had then."""
    tenant = values["tenant"]
    match values["kind"]:
        case "Tenant":
            return TenantState(tenant, values.get("suspended", False))
        case "Key":
            who = Principal(tenant, values["key"], frozenset(map(Role, values["roles"].split())))
            verifier = Verifier(bytes.fromhex(values["salt"]), bytes.fromhex(values["verifier"]))
            return KeyState(who, verifier, values["revoked"])
        case "Channel":
            canary = None
            if values.get("canary") is not None:
                release = ReleaseRef(values["canary"], values["canary_digest"])
                canary = CanarySplit(release, values["permille"], values["salt"])
            return ChannelState(
                tenant,
                values["channel"],
                ReleaseRef(values["release"], values["digest"]),
                canary,
                tuple(ReleaseRef(*pair) for pair in json.loads(values.get("earlier", "[]"))),
            )
        case "Release":
            return RecentRelease(tenant, ReleaseRef(values["number"], values["digest"]))
        case kind:
            return UnknownEntry(kind)
