"""The store's history, as readers are told it: `backpack_serving.sync.session.Log`."""

from __future__ import annotations

import json
from typing import Any

from backpack_serving.interventions.records import Event, Position, visible
from backpack_serving.interventions.service import Interventions
from backpack_serving.keys import Principal, Role, Verifier
from backpack_serving.sync.known import (
    Canary,
    Known,
    KnownChannel,
    KnownKey,
    KnownRelease,
    KnownTenant,
    ReleaseRef,
    Unknown,
)
from backpack_serving.sync.session import Page


class Journal:
    """Reads the events of an intervention service, so many at a time."""

    def __init__(self, service: Interventions, page: int = 1000) -> None:
        self._service, self._page = service, page

    @property
    def fingerprint(self) -> str:
        return self._service.shape.fingerprint

    def snapshot(self) -> Page:
        at, records = self._service.snapshot()
        return Page(at, at, tuple(_known(visible(record)) for record in records))

    def since(self, revision: int) -> Page | None:
        head, events = self._service.events_after(revision, self._page)
        if events and events[0].revision != revision + 1:
            return None
        upto = Position(head.epoch, events[-1].revision if events else revision)
        return Page(head, min(upto, head), tuple(change for event in events for change in _changes(event)))


def _changes(event: Event) -> list[Known]:
    return [_known(values) for values in json.loads(event.changes)]


def _known(values: dict[str, Any]) -> Known:
    """A record as an event tells it. Fields that older events lack have the meaning that they had then."""
    tenant = values["tenant"]
    match values["kind"]:
        case "Tenant":
            return KnownTenant(tenant, values.get("suspended", False))
        case "Key":
            who = Principal(tenant, values["key"], frozenset(map(Role, values["roles"].split())))
            verifier = Verifier(bytes.fromhex(values["salt"]), bytes.fromhex(values["verifier"]))
            return KnownKey(who, verifier, values["revoked"])
        case "Channel":
            canary = None
            if values.get("canary") is not None:
                release = ReleaseRef(values["canary"], values["canary_digest"])
                canary = Canary(release, values["permille"], values["salt"])
            return KnownChannel(
                tenant,
                values["channel"],
                ReleaseRef(values["release"], values["digest"]),
                canary,
                tuple(ReleaseRef(*pair) for pair in json.loads(values.get("earlier", "[]"))),
            )
        case "Release":
            return KnownRelease(tenant, ReleaseRef(values["number"], values["digest"]))
        case kind:
            return Unknown(kind)
