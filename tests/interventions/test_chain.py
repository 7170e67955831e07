"""P13: every write has one audit entry, in its own transaction; and whoever touches one breaks the chain."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
import sqlalchemy as sa
from backpack_serving.errors import ServiceError
from backpack_serving.interventions import ledger
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.sql import SQLStore
from backpack_serving.interventions.store import Read, Store

from tests.interventions.conftest import ADMIN, HALVE, SHAPE, releaser
from tests.interventions.postgres import Postgres
from tests.interventions.test_database import fill, unguarded

TEXTS = ("tenant", "principal", "method", "resource", "changes", "hash")


def flip(value: str, chance: random.Random) -> str:
    """One bit of one byte, so that it is text still."""
    data = bytearray(value.encode())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(7)
    return data.decode().replace("\0", "x")


def check_flips(store: SQLStore, postgres: Postgres, flips: int) -> int:
    """Flip bits in the table of events, one at a time: each must be found, where it is."""
    service, chance = fill(store), random.Random(flips)
    count = 5
    for number in range(flips):
        column, revision = (*TEXTS, "time", "revision")[number % 8], 1 + chance.randrange(count)
        with unguarded(store, postgres) as connection:
            where = {"revision": revision}
            old = connection.scalar(sa.text(f"SELECT {column} FROM events WHERE revision = :revision"), where)
            new = flip(old, chance) if column in TEXTS else old ^ 1 << chance.randrange(3, 40)  # no number in use
            change = sa.text(f"UPDATE events SET {column} = :new WHERE revision = :revision")
            connection.execute(change, {**where, "new": new})
        broken = service.events.verify_chain(ADMIN)[1]
        assert broken is not None, f"{column} of entry {revision} was {old!r}, became {new!r}, and nobody noticed"
        assert broken <= revision + 1 or broken == new, "told by the place, or by the number it was given"
        with unguarded(store, postgres) as connection:
            changed = new if column == "revision" else revision
            undo = sa.text(f"UPDATE events SET {column} = :old WHERE revision = :changed")
            connection.execute(undo, {"old": old, "changed": changed})
        assert service.events.verify_chain(ADMIN) == (count, None)
    return flips


@pytest.mark.parametrize("flips", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_p13_any_flipped_byte_is_found(url: str, postgres: Postgres, flips: int) -> None:
    with closing(open_store(url)) as store:
        assert check_flips(store, postgres, flips) == flips


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ("DELETE FROM events WHERE revision = 3", 4),
        ("DELETE FROM events WHERE revision = 5", 5),
        ("DELETE FROM events WHERE revision = 5; UPDATE head SET revision = 4", 5),
        ("UPDATE events SET revision = 6 WHERE revision = 5", 6),
        ("INSERT INTO events SELECT 6, tenant, principal, method, resource, changes, time, hash FROM events"
         " WHERE revision = 5", 6),
        ("UPDATE events SET revision = 9 WHERE revision = 4; UPDATE events SET revision = 4 WHERE revision = 5;"
         "UPDATE events SET revision = 5 WHERE revision = 9", 4),
        ("UPDATE head SET hash = ''", 6),
    ],
    ids=["removed", "tail removed", "tail and head", "renumbered", "forged", "swapped", "head"],
)  # fmt: skip
def test_p13_entries_that_go_come_or_move_are_found(url: str, postgres: Postgres, change: str, broken: int) -> None:
    with closing(open_store(url)) as store:
        service = fill(store)
        with unguarded(store, postgres) as connection:
            for statement in change.split(";"):
                connection.execute(sa.text(statement))
        assert service.events.verify_chain(ADMIN)[1] == broken


@pytest.mark.parametrize("page", [1, 2, 5])
def test_p13_the_service_reads_and_writes_while_the_chain_is_verified(
    store: Store, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    service, read, between = fill(store), store.read, 0

    @contextmanager
    def watched(tenant: str | None = None) -> Iterator[Read]:
        nonlocal between
        with read(tenant) as tx:
            yield tx
        between += 1
        if between == 1:  # whoever waited for a store's one lock has it now
            service.patches.create_patch(releaser("acme"), "meanwhile", "", IdempotencyKey())

    monkeypatch.setattr(ledger, "PAGE", page)
    monkeypatch.setattr(store, "read", watched)
    assert service.events.verify_chain(ADMIN) == (6, None), "what was written between two pages is in the chain"
    assert between == 6 // page + 1


def test_p13_every_write_is_told_by_whom_to_what(url: str) -> None:
    with closing(open_store(url)) as store:
        service = fill(store)
        entries = service.events.list_entries(ADMIN, None, 10)[::-1]
        told = [(e.method, e.principal.split("/")[1], e.resource) for e in entries]
        assert told == [
            ("CreateTenant", "system", "tenants/acme"),
            ("CreatePatch", "acme", "tenants/acme/patches/p"),
            ("CreateRevision", "acme", "tenants/acme/patches/p/revisions/1"),
            ("CreateRelease", "acme", "tenants/acme/releases/1"),
            ("Activate", "acme", "tenants/acme/channels/live"),
        ]


def test_p13_a_refused_write_has_no_entry(url: str) -> None:
    with closing(open_store(url)) as store:
        service, acme = fill(store), releaser("acme")
        for refused in (
            lambda: service.patches.create_patch(acme, "p", "", IdempotencyKey()),
            lambda: service.releases.create_release(acme, [("p", 9)], "", IdempotencyKey()),
            lambda: service.channels.activate(acme, "live", 1, "stale", IdempotencyKey()),
            lambda: service.patches.create_revision(acme, "nothing", [HALVE], IdempotencyKey()),
        ):
            with pytest.raises(ServiceError):
                refused()
        assert service.events.verify_chain(ADMIN) == (5, None)
        assert Interventions(store, SHAPE).events.snapshot()[0].revision == 5
