"""The rules, on every store."""

from __future__ import annotations

import itertools
import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from backpack_lm.patch import Cell, ModelShape, RevisionContent, ScaleEdit, release_digest
from backpack_serving.auth.keys import SYSTEM, ApiKeySecret, Principal, Role
from backpack_serving.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    ServiceError,
    Unauthenticated,
)
from backpack_serving.interventions.event_history import EventHistory
from backpack_serving.interventions.fleet import HoldState, ReaderTracker
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.store import Read, Store
from backpack_serving.references import LIVE, ReaderKind
from backpack_serving.sync.messages import Ack, Delta, Hello
from backpack_serving.sync.server import SyncServer
from backpack_serving.sync.state import StateView, UnknownEntry

from tests.interventions.conftest import ADMIN, HALVE, REMOVE, REPLICA, SHAPE, releaser


def test_a_new_tenant_serves_the_empty_release(service: Interventions) -> None:
    service.tenants.create_tenant(ADMIN, "acme", IdempotencyKey())
    live = service.channels.get_channel(releaser("acme"), LIVE)
    assert (live.release, live.digest, live.previous) == (0, release_digest([]), None)


def test_every_write_moves_the_store_by_one_and_is_audited(service: Interventions) -> None:
    start = service.events.snapshot()[0].revision
    positions = [service.tenants.create_tenant(ADMIN, f"t{n}", IdempotencyKey()).position.revision for n in range(5)]
    assert positions == list(range(start + 1, start + 6))
    entries = service.events.list_entries(ADMIN, None, 5)
    assert [e.resource for e in entries] == [f"tenants/t{n}" for n in reversed(range(5))]
    assert service.events.verify_chain(ADMIN) == (start + 5, None)


def test_revisions_and_releases_are_numbered_without_gaps(service: Interventions, acme: Principal) -> None:
    numbers = [
        service.patches.create_revision(acme, "debias", [e], IdempotencyKey()).record.number for e in (HALVE, REMOVE)
    ]
    with pytest.raises(InvalidRequest):
        service.patches.create_revision(acme, "debias", [ScaleEdit((Cell(3, 9),), 0.5)], IdempotencyKey())
    numbers.append(service.patches.create_revision(acme, "debias", [HALVE, REMOVE], IdempotencyKey()).record.number)
    assert numbers == [1, 2, 3]
    releases = [service.releases.create_release(acme, [("debias", n)], "", IdempotencyKey()).record for n in (1, 2)]
    assert [r.number for r in releases] == [1, 2]
    assert releases[0].digest == release_digest([RevisionContent(SHAPE.fingerprint, (HALVE,)).digest])


def test_the_order_of_revisions_is_part_of_a_release(service: Interventions, acme: Principal) -> None:
    for edit in (HALVE, REMOVE):
        service.patches.create_revision(acme, "debias", [edit], IdempotencyKey())
    both = [service.releases.create_release(acme, parts, "", IdempotencyKey()).record
            for parts in ([("debias", 1), ("debias", 2)], [("debias", 2), ("debias", 1)])]  # fmt: skip
    assert both[0].digest != both[1].digest
    assert service.releases.fetch_release(REPLICA, "acme", both[1].digest) == [
        RevisionContent(SHAPE.fingerprint, (edit,)).to_bytes() for edit in (REMOVE, HALVE)
    ]


@pytest.fixture
def two_releases(service: Interventions, acme: Principal) -> Principal:
    for number, edit in enumerate((HALVE, REMOVE), 1):
        service.patches.create_revision(acme, "debias", [edit], IdempotencyKey())
        service.releases.create_release(acme, [("debias", number)], "", IdempotencyKey())
    return acme


def test_activate_needs_the_etag_of_what_was_read(service: Interventions, two_releases: Principal) -> None:
    etag = service.channels.get_channel(two_releases, LIVE).etag
    service.channels.activate(two_releases, LIVE, 1, etag, IdempotencyKey())
    with pytest.raises(Conflict, match="someone changed it"):
        service.channels.activate(two_releases, LIVE, 2, etag, IdempotencyKey())
    with pytest.raises(InvalidRequest, match="etag"):
        service.channels.activate(two_releases, LIVE, 2, "", IdempotencyKey())
    assert service.channels.get_channel(two_releases, LIVE).release == 1


def test_rollback_returns_to_the_release_before(service: Interventions, two_releases: Principal) -> None:
    etag = service.channels.get_channel(two_releases, LIVE).etag
    with pytest.raises(PreconditionFailed, match="activate one"):
        service.channels.rollback(two_releases, LIVE, etag, IdempotencyKey())
    for release in (1, 2):
        etag = service.channels.activate(two_releases, LIVE, release, etag, IdempotencyKey()).record.etag
    back = service.channels.rollback(two_releases, LIVE, etag, IdempotencyKey()).record
    assert (back.release, back.previous, back.generation) == (1, 2, 4)


@pytest.mark.parametrize("canary", [False, True])
def test_activating_the_release_that_a_channel_is_at_leaves_a_rollback_where_it_goes(
    service: Interventions, two_releases: Principal, canary: bool
) -> None:
    etag = service.channels.activate(
        two_releases, LIVE, 0, service.channels.get_channel(two_releases, LIVE).etag, IdempotencyKey()
    ).record.etag
    with pytest.raises(PreconditionFailed, match="activate one"):  # it is the one that a tenant begins with
        service.channels.rollback(two_releases, LIVE, etag, IdempotencyKey())
    for release in (1, 2):
        etag = service.channels.activate(two_releases, LIVE, release, etag, IdempotencyKey()).record.etag
    if canary:
        etag = service.channels.start_canary(two_releases, LIVE, 1, 10, "", etag, IdempotencyKey()).record.etag
    again = service.channels.activate(two_releases, LIVE, 2, etag, IdempotencyKey()).record
    assert (again.release, again.previous, again.canary) == (2, 1, None)
    back = service.channels.rollback(two_releases, LIVE, again.etag, IdempotencyKey()).record
    assert (back.release, back.previous) == (1, 2)


def test_a_channel_is_made_by_activating_on_it(service: Interventions, two_releases: Principal) -> None:
    made = service.channels.activate(two_releases, "beta", 2, "", IdempotencyKey()).record
    assert (made.release, made.generation) == (2, 1)
    assert service.channels.get_channel(two_releases, LIVE).release == 0
    with pytest.raises(NotFound, match="releases/7"):
        service.channels.activate(two_releases, "beta", 7, made.etag, IdempotencyKey())


def test_a_repeated_request_has_one_effect_and_the_same_answer(service: Interventions, two_releases: Principal) -> None:
    request = IdempotencyKey(str(uuid.uuid4()), "body")
    etag = service.channels.get_channel(two_releases, LIVE).etag
    first = service.channels.activate(two_releases, LIVE, 1, etag, request)
    service.channels.activate(two_releases, LIVE, 2, first.record.etag, IdempotencyKey())
    again = service.channels.activate(two_releases, LIVE, 1, etag, request)
    assert (again.record, again.position, again.repeated) == (first.record, first.position, True)
    assert service.channels.get_channel(two_releases, LIVE).release == 2
    with pytest.raises(InvalidRequest, match="used for another request"):
        service.channels.activate(two_releases, LIVE, 1, etag, IdempotencyKey(request.id, "other body"))
    with pytest.raises(InvalidRequest, match="UUID4"):
        service.channels.activate(two_releases, LIVE, 1, etag, IdempotencyKey("7", "body"))


def test_the_same_request_at_the_same_time_has_one_effect(service: Interventions) -> None:
    request, written = IdempotencyKey(str(uuid.uuid4()), "body"), []
    act = lambda: written.append(service.tenants.create_tenant(ADMIN, "acme", request))  # noqa: E731
    threads = [threading.Thread(target=act) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({w.position for w in written}) == 1
    assert sorted(w.repeated for w in written) == [False] + [True] * 7


def test_processes_that_start_at_once_on_an_empty_store_add_their_key_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, key, read = Interventions(store, SHAPE), Interventions(store, SHAPE), ApiKeySecret.mint(), store.read

    @contextmanager
    def overtaken(tenant: str | None = None) -> Iterator[Read]:
        with read(tenant) as tx:
            yield tx
        monkeypatch.undo()
        other.tenants.bootstrap(key, [Role.ADMIN])

    monkeypatch.setattr(store, "read", overtaken)
    one.tenants.bootstrap(key, [Role.ADMIN])
    assert one.tenants.authenticate(str(key)) == Principal(SYSTEM, key.id, frozenset({Role.ADMIN}))
    assert one.events.verify_chain(ADMIN) == (1, None)


def test_an_operators_key_that_is_somebody_elses_is_refused(service: Interventions, acme: Principal) -> None:
    _, tenants = service.tenants.create_key(ADMIN, "acme", [Role.CALLER], IdempotencyKey())
    assert tenants
    with pytest.raises(PreconditionFailed, match=r"shall be admin is tenants/acme/keys/\w+ \(caller\) already"):
        service.tenants.bootstrap(tenants, [Role.ADMIN])
    both = ApiKeySecret.mint()
    for _ in range(2):
        service.tenants.bootstrap(both, [Role.ADMIN])
    with pytest.raises(PreconditionFailed, match=r"shall be replica is tenants/system/keys/\w+ \(admin\) already"):
        service.tenants.bootstrap(both, [Role.REPLICA])


def test_a_secret_is_shown_once(service: Interventions, acme: Principal) -> None:
    request = IdempotencyKey(str(uuid.uuid4()), "body")
    written, key = service.tenants.create_key(ADMIN, "acme", [Role.CALLER], request)
    again, nothing = service.tenants.create_key(ADMIN, "acme", [Role.CALLER], request)
    assert (again.record, nothing) == (written.record, None)
    assert key is not None
    who = service.tenants.authenticate(str(key))
    assert who == Principal("acme", key.id, frozenset({Role.CALLER}))
    assert key.secret not in repr(key)
    assert key.secret not in str(service.events.snapshot())


def test_a_key_that_is_wrong_or_revoked_is_nobody(service: Interventions, acme: Principal) -> None:
    written, key = service.tenants.create_key(ADMIN, "acme", [Role.CALLER], IdempotencyKey())
    assert key is not None
    with pytest.raises(Unauthenticated, match="unknown or revoked"):
        service.tenants.authenticate(str(ApiKeySecret(key.id, "0" * 64)))
    with pytest.raises(Unauthenticated, match="wrong or missing"):
        service.tenants.authenticate(str(key)[:-1])
    service.tenants.revoke_key(ADMIN, "acme", written.record.key, IdempotencyKey())
    with pytest.raises(Unauthenticated, match="unknown or revoked"):
        service.tenants.authenticate(str(key))


@pytest.mark.parametrize("suspended", [True, False])
def test_who_was_away_learns_how_a_tenant_is_now(service: Interventions, acme: Principal, suspended: bool) -> None:
    """P6: a tenant may be suspended and resumed several times between two messages to a gateway."""
    before, _ = service.events.snapshot()
    for _ in range(2):
        service.tenants.suspend(ADMIN, ["acme"], False, IdempotencyKey())
        service.tenants.resume(ADMIN, ["acme"], IdempotencyKey())
    if suspended:
        service.tenants.suspend(ADMIN, ["acme"], False, IdempotencyKey())
    gateway = SyncServer(EventHistory(service), itertools.count())
    gateway.receive(Hello(ReaderKind.GATEWAY, "incarnation", "name", SHAPE.fingerprint, before), 0.0)
    (told,) = gateway.pump(0.0)
    assert isinstance(told, Delta)
    assert StateView().changed(told.position, told.changes).tenants["acme"].suspended == suspended


def test_entries_that_readers_do_not_need_are_called_what_events_call_them(
    service: Interventions, acme: Principal
) -> None:
    """And not what their classes are called."""
    before, _ = service.events.snapshot()
    service.patches.create_revision(acme, "debias", [HALVE], IdempotencyKey())
    page = EventHistory(service).since(before.revision)
    assert page is not None
    _, (event,) = service.events.events_after(before.revision, 10)
    kinds = {values["kind"] for values in json.loads(event.changes)}
    assert {entry.kind for entry in page.changes if isinstance(entry, UnknownEntry)} == kinds


def test_p11_a_new_tenants_channel_is_held_by_who_was_told_of_it(service: Interventions) -> None:
    before, _ = service.events.snapshot()
    gateway, fleet = SyncServer(EventHistory(service), itertools.count()), ReaderTracker()
    gateway.receive(Hello(ReaderKind.GATEWAY, "incarnation", "name", SHAPE.fingerprint, before), 0.0)
    fleet.record(gateway)
    service.tenants.create_tenant(ADMIN, "acme", IdempotencyKey())
    position, live = service.channels.channel_now(releaser("acme"), LIVE)
    assert [hold.state for hold in fleet.holds(live, position, fleet.readers())] == [HoldState.STALE]
    (told,) = gateway.pump(0.0)
    assert isinstance(told, Delta)
    gateway.receive(Ack(told.nonce), 0.0)
    assert [hold.state for hold in fleet.holds(live, position, fleet.readers())] == [HoldState.ACKED]


def check_force(store: Store) -> None:
    """P15: suspending more than the larger of 10 and a tenth of the active tenants at once needs `force`."""
    service = Interventions(store, SHAPE)
    service.tenants.bootstrap(ApiKeySecret.mint(), [Role.ADMIN])
    names = [f"t{n}" for n in range(130)]
    for name in names:
        service.tenants.create_tenant(ADMIN, name, IdempotencyKey())
    before = service.events.snapshot()
    for some in (names, names[:14]):
        with pytest.raises(PreconditionFailed, match="need `force`"):
            service.tenants.suspend(ADMIN, some, False, IdempotencyKey())
    assert service.events.snapshot() == before
    service.tenants.suspend(ADMIN, names[:13], False, IdempotencyKey())  # a tenth of 130
    with pytest.raises(PreconditionFailed, match="more than 11"):
        service.tenants.suspend(ADMIN, names[13:25], False, IdempotencyKey())  # of the 117 that are left
    service.tenants.suspend(ADMIN, names[13:], True, IdempotencyKey())
    assert sum(t.suspended for t in service.tenants.list_tenants(ADMIN, None, 1000)) == 130
    service.tenants.resume(ADMIN, names, IdempotencyKey())
    assert not any(t.suspended for t in service.tenants.list_tenants(ADMIN, None, 1000))


def test_p15_a_change_that_ends_the_service_of_many_needs_force(store: Store) -> None:
    check_force(store)


def test_roles(service: Interventions, acme: Principal) -> None:
    caller = Principal("acme", "k", frozenset({Role.CALLER}))
    author = Principal("acme", "k", frozenset({Role.AUTHOR}))
    for refused in (
        lambda: service.tenants.create_tenant(acme, "other", IdempotencyKey()),
        lambda: service.patches.create_patch(caller, "p", "", IdempotencyKey()),
        lambda: service.channels.activate(author, LIVE, 0, "", IdempotencyKey()),
        lambda: service.releases.list_releases(caller, None, 9),
        lambda: service.releases.fetch_release(author, "acme", release_digest([])),
    ):
        with pytest.raises(Forbidden, match="has the roles"):
            refused()
    nobody = Principal("acme", "k", frozenset())
    channels, releases = service.channels, service.releases
    for read in (
        lambda who: channels.get_channel(who, LIVE),
        lambda who: channels.list_channels(who, None, 9),
        lambda who: releases.get_release(who, 0),
    ):
        assert read(caller) == read(author)
        with pytest.raises(Forbidden, match="has the roles none; this needs author or caller"):
            read(nobody)
    with pytest.raises(InvalidRequest, match=SYSTEM):
        service.tenants.create_key(ADMIN, "acme", [Role.ADMIN], IdempotencyKey())


def test_tenants_do_not_see_each_other(service: Interventions, two_releases: Principal) -> None:
    service.tenants.create_tenant(ADMIN, "other", IdempotencyKey())
    other = releaser("other")
    assert service.patches.list_patches(other, None, 10) == []
    with pytest.raises(NotFound):
        service.patches.get_revision(other, "debias", 1)
    with pytest.raises(NotFound):
        service.releases.create_release(other, [("debias", 1)], "", IdempotencyKey())
    with pytest.raises(NotFound):
        service.releases.fetch_release(
            REPLICA, "other", service.releases.list_releases(two_releases, None, 1)[0][0].digest
        )
    assert {e.tenant for e in service.events.list_entries(other, None, 100)} == {"other"}


def test_a_request_id_is_a_uuid4_and_nothing_more(service: Interventions, acme: Principal) -> None:
    drawn = uuid.uuid4()
    for number, good in enumerate((str(drawn), drawn.hex.upper(), drawn.urn, f"{{{drawn}}}")):
        service.patches.create_patch(acme, f"p{number}", "", IdempotencyKey(good))
    for bad in ("x", str(uuid.uuid1()), f"{drawn}\0", "-" * 900_000 + drawn.hex):
        with pytest.raises(InvalidRequest, match="is not a UUID4"):
            service.patches.create_patch(acme, "q", "", IdempotencyKey(bad))


def test_a_salt_that_is_refused_is_told(service: Interventions, two_releases: Principal) -> None:
    for salt in ("\n", "s" * 65):
        with pytest.raises(InvalidRequest, match=re.escape(f"salt: {salt!r}; at most 64 printable")):
            service.channels.start_canary(two_releases, LIVE, 1, 10, salt, "", IdempotencyKey())


@pytest.mark.parametrize("name", ["", "Upper", "1st", "a" * 64, "with space", "ü", "a/b"])
def test_bad_names(service: Interventions, acme: Principal, name: str) -> None:
    with pytest.raises(InvalidRequest, match="a-z"):
        service.patches.create_patch(acme, name, "", IdempotencyKey())
    with pytest.raises(InvalidRequest, match="a-z"):
        service.patches.draft_revision(acme, name, [HALVE])


def test_what_exists_is_not_made_again(service: Interventions, acme: Principal) -> None:
    with pytest.raises(AlreadyExists):
        service.tenants.create_tenant(ADMIN, "acme", IdempotencyKey())
    with pytest.raises(AlreadyExists):
        service.patches.create_patch(acme, "debias", "", IdempotencyKey())


def test_a_refused_write_leaves_nothing_behind(service: Interventions, acme: Principal) -> None:
    before = service.events.snapshot(), service.events.verify_chain(ADMIN)
    with pytest.raises(ServiceError):
        service.releases.create_release(acme, [("debias", 1)], "", IdempotencyKey())
    assert (service.events.snapshot(), service.events.verify_chain(ADMIN)) == before


def test_a_release_of_another_model_is_not_activated(store: Store, service: Interventions, two_releases) -> None:
    shape = ModelShape("cd" * 32, SHAPE.vocab_size, SHAPE.num_senses, SHAPE.width, SHAPE.sense_rms)
    upgraded = Interventions(store, shape)
    etag = upgraded.channels.get_channel(two_releases, LIVE).etag
    with pytest.raises(PreconditionFailed, match="create the revision again"):
        upgraded.channels.activate(two_releases, LIVE, 1, etag, IdempotencyKey())


def test_a_draft_is_checked_and_not_stored(service: Interventions, acme: Principal) -> None:
    draft = service.patches.draft_revision(acme, "debias", [HALVE])
    assert draft.number == 1
    assert service.patches.list_revisions(acme, "debias", None, 10) == []
    with pytest.raises(InvalidRequest, match="scaling by 1"):
        service.patches.draft_revision(acme, "debias", [ScaleEdit((Cell(3, 1),), 1.0)])


def test_events_tell_what_gateways_must_learn(service: Interventions, two_releases: Principal) -> None:
    start = service.events.snapshot()[0].revision
    etag = service.channels.get_channel(two_releases, LIVE).etag
    service.patches.create_patch(two_releases, "other", "", IdempotencyKey())
    service.channels.activate(two_releases, LIVE, 2, etag, IdempotencyKey())
    position, events = service.events.events_after(start)
    assert [(e.revision, e.method) for e in events] == [(start + 1, "CreatePatch"), (start + 2, "Activate")]
    assert events[0].changes == "[]"
    assert '"release": 2' in events[1].changes
    assert position.revision == start + 2


def test_pages(service: Interventions, acme: Principal) -> None:
    for n in range(5):
        service.patches.create_patch(acme, f"p{n}", "", IdempotencyKey())
    first = service.patches.list_patches(acme, None, 4)
    assert [p.patch for p, _ in first] == ["debias", "p0", "p1", "p2"]
    assert [p.patch for p, _ in service.patches.list_patches(acme, "p2", 4)] == ["p3", "p4"]
