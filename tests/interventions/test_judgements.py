"""What a release does to ordinary text: who says so, what channels make of it; and which releases can be deleted."""

from __future__ import annotations

import json
import math
import uuid
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from backpack_serving.auth.keys import Principal
from backpack_serving.errors import Forbidden, InvalidRequest, NotFound, PreconditionFailed
from backpack_serving.interventions import database
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.records import EventRecord, ReleaseStatusRecord
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.store import Store
from backpack_serving.references import LIVE, ReleaseRef

from tests.interventions.conftest import ADMIN, HALVE, REMOVE, REPLICA, SHAPE, releaser
from tests.interventions.postgres import Postgres
from tests.interventions.test_database import _upgrade

ONCE = IdempotencyKey()


@pytest.fixture
def bounded(store: Store) -> Interventions:
    """A service that refuses releases under which ordinary text gets worse by more than 5 %; with two releases."""
    service = Interventions(store, SHAPE, degradation=0.05)
    service.tenants.create_tenant(ADMIN, "acme", ONCE)
    acme = releaser("acme")
    service.patches.create_patch(acme, "debias", "", ONCE)
    for number, edit in enumerate((HALVE, REMOVE), 1):
        service.patches.create_revision(acme, "debias", [edit], ONCE)
        service.releases.create_release(acme, [("debias", number)], "", ONCE)
    return service


ACME = releaser("acme")


def judge(service: Interventions, number: int, after: float) -> ReleaseRef:
    ref = service.releases.get_release(ACME, number)[0].ref
    service.judgements.record(REPLICA, "acme", ref, 2040, 40.0, after)
    return ref


def etag(service: Interventions) -> str:
    return service.channels.get_channel(ACME, LIVE).etag


def test_a_channel_refuses_a_release_that_makes_ordinary_text_worse(bounded: Interventions) -> None:
    judge(bounded, 1, 41.9)
    judge(bounded, 2, 42.1)
    moved = bounded.channels.activate(ACME, LIVE, 1, etag(bounded), ONCE).record
    assert moved.judgement == "perplexity of ordinary text 40 → 41.9 (+4.7%)"
    for refused in (
        lambda: bounded.channels.activate(ACME, LIVE, 2, etag(bounded), ONCE),
        lambda: bounded.channels.start_canary(ACME, LIVE, 2, 10, "", etag(bounded), ONCE),
    ):
        with pytest.raises(PreconditionFailed, match=r"40 → 42.1 \(\+5.2%\), and 5.0% is the most") as caught:
            refused()
        assert caught.value.reason == "DEGRADES"
    assert bounded.channels.get_channel(ACME, LIVE) == moved
    bounded.channels.start_canary(ACME, LIVE, 2, 10, "", etag(bounded), ONCE, allow_degradation=True)
    with pytest.raises(PreconditionFailed, match="allow_degradation"):
        bounded.channels.promote_canary(ACME, LIVE, etag(bounded), ONCE)
    bounded.channels.promote_canary(ACME, LIVE, etag(bounded), ONCE, allow_degradation=True)
    worse = bounded.channels.get_channel(ACME, LIVE)
    assert worse.judgement == "perplexity of ordinary text 40 → 42.1 (+5.2%), allowed"
    bounded.channels.activate(ACME, LIVE, 0, etag(bounded), ONCE)
    back = bounded.channels.rollback(ACME, LIVE, etag(bounded), ONCE).record
    assert (back.release, back.judgement) == (2, worse.judgement), "a rollback never waits for a permission"


def test_what_was_known_of_a_release_is_in_the_audit_trail(bounded: Interventions) -> None:
    bounded.channels.activate(ACME, LIVE, 1, etag(bounded), ONCE)
    judge(bounded, 2, 80.0)
    bounded.channels.activate(ACME, LIVE, 2, etag(bounded), ONCE, allow_degradation=True)
    last, judged, first = bounded.events.list_entries(ADMIN, None, 3)
    assert json.loads(first.changes)[0]["judgement"] == "not judged"
    assert (judged.method, judged.principal) == ("RecordJudgement", REPLICA.name)
    assert judged.resource == "tenants/acme/releases/2"
    assert json.loads(last.changes)[0]["judgement"] == "perplexity of ordinary text 40 → 80 (+100.0%), allowed"
    assert bounded.events.verify_chain(ADMIN)[1] is None


def test_the_first_judgement_stays(bounded: Interventions) -> None:
    ref = judge(bounded, 1, 41.0)
    position = bounded.events.position()
    assert bounded.judgements.record(REPLICA, "acme", ref, 2040, 40.0, 80.0).after == 41.0
    assert bounded.events.position() == position, "nothing is written"
    assert bounded.releases.get_release(ACME, 1)[1].change == pytest.approx(0.025)


def test_who_may_judge_and_what_is_no_judgement(bounded: Interventions) -> None:
    ref = bounded.releases.get_release(ACME, 1)[0].ref
    with pytest.raises(Forbidden):
        bounded.judgements.record(ACME, "acme", ref, 2040, 40.0, 41.0)
    for tokens, before, after in ((0, 1.0, 1.0), (1, 0.0, 1.0), (1, 1.0, math.inf), (1, math.nan, 1.0)):
        with pytest.raises(InvalidRequest, match="positive numbers"):
            bounded.judgements.record(REPLICA, "acme", ref, tokens, before, after)
    for wrong in (ReleaseRef(9, ref.digest), ReleaseRef(1, "00" * 32)):
        with pytest.raises(NotFound):
            bounded.judgements.record(REPLICA, "acme", wrong, 2040, 40.0, 41.0)
    assert bounded.releases.get_release(ACME, 1)[1].tokens == 0


def test_a_repeated_activation_is_not_judged_anew(bounded: Interventions) -> None:
    request = IdempotencyKey(str(uuid.uuid4()), "body")
    before = etag(bounded)
    moved = bounded.channels.activate(ACME, LIVE, 1, before, request)
    judge(bounded, 1, 80.0)
    again = bounded.channels.activate(ACME, LIVE, 1, before, request)
    assert (again.record, again.repeated) == (moved.record, True)


def test_a_judgement_is_expected_of_new_releases_alone(bounded: Interventions, store: Store) -> None:
    assert 0.0 < bounded.judgements.expected(ACME, 1) <= 10.0
    assert bounded.judgements.expected(ACME, 0) == 0.0, "the model unpatched"
    assert bounded.judgements.expected(ACME, 9) == 0.0
    judge(bounded, 1, 41.0)
    assert bounded.judgements.expected(ACME, 1) == 0.0
    unbounded = Interventions(store, SHAPE)
    assert unbounded.judgements.expected(ACME, 2) == 0.0
    judge(bounded, 2, 80.0)
    unbounded.channels.activate(ACME, LIVE, 2, etag(unbounded), ONCE)


def test_a_release_that_was_never_served_can_be_deleted(bounded: Interventions) -> None:
    bounded.channels.activate(ACME, LIVE, 1, etag(bounded), ONCE)
    bounded.channels.activate(ACME, LIVE, 0, etag(bounded), ONCE)
    for number, why in ((1, "a channel was at it"), (0, "it is the model unpatched")):
        with pytest.raises(PreconditionFailed, match=why):
            bounded.releases.delete_release(ACME, number, ONCE)
    assert bounded.releases.delete_release(ACME, 2, ONCE).record.number == 2
    assert [record.number for record, _ in bounded.releases.list_releases(ACME, None, 1)] == [1]
    found = bounded.releases.list_releases(ACME, None, 10, deleted=True)
    assert [(r.number, s.served, s.deleted) for r, s in found] == [(2, False, True), (1, True, False), (0, True, False)]
    assert bounded.releases.get_release(ACME, 2)[1].deleted
    for refused in (
        lambda: bounded.channels.activate(ACME, LIVE, 2, etag(bounded), ONCE),
        lambda: bounded.channels.start_canary(ACME, LIVE, 2, 10, "", etag(bounded), ONCE),
        lambda: bounded.releases.resolve_releases(REPLICA, "acme", [2]),
        lambda: bounded.releases.delete_release(ACME, 2, ONCE),
    ):
        with pytest.raises(NotFound, match="releases/2 is deleted"):
            refused()
    made = bounded.releases.create_release(ACME, [("debias", 2)], "", ONCE).record
    assert made.number == 3, "the number is never used again"
    assert bounded.events.verify_chain(ADMIN)[1] is None


def test_a_channels_release_stays_though_nobody_has_noted_that_it_is_served(bounded: Interventions) -> None:
    """As after an older version of the service has moved the channel."""
    for release in (1, 2, 0):
        bounded.channels.activate(ACME, LIVE, release, etag(bounded), ONCE)
    with bounded.channels._context.store.write("acme") as tx:
        for number in (1, 2):
            tx.replace(ReleaseStatusRecord("acme", number))
        tx.log(EventRecord(0, "acme", "p", "Test", "r", "[]", datetime.now(UTC)))
    for number in (1, 2):
        with pytest.raises(PreconditionFailed, match="a channel was at it"):
            bounded.releases.delete_release(ACME, number, ONCE)


def test_pages_of_releases_skip_deleted_ones(bounded: Interventions) -> None:
    for _ in range(7):
        bounded.releases.create_release(ACME, [("debias", 1)], "", ONCE)
    for number in (8, 7, 6, 3):
        bounded.releases.delete_release(ACME, number, ONCE)
    pages, after = [], None
    while page := bounded.releases.list_releases(ACME, after, 2):
        pages.append([record.number for record, _ in page])
        after = page[-1][0].number
    assert pages == [[9, 5], [4, 2], [1, 0]]


def test_another_tenants_release_is_not_there(bounded: Interventions) -> None:
    bounded.tenants.create_tenant(ADMIN, "other", ONCE)
    other: Principal = releaser("other")
    with pytest.raises(NotFound):
        bounded.releases.delete_release(other, 2, ONCE)
    assert bounded.judgements.expected(other, 2) == 0.0
    assert not bounded.releases.get_release(ACME, 2)[1].deleted


def test_a_migration_knows_which_releases_were_served(postgres: Postgres, tmp_path: object) -> None:
    for url in (f"sqlite:///{tmp_path}/i.db", postgres.empty()):
        engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            _upgrade(connection, "0003")
            if "postgres" in url:
                connection.execute(sa.text("SELECT set_config('backpack.tenant', '*', true)"))
            for revision, (release, canary) in enumerate(((0, None), (1, 3), (0, None)), 1):
                changes = json.dumps([{"kind": "Channel", "release": release, "canary": canary}])
                event = {"at": revision, "changes": changes}
                connection.execute(
                    sa.text("INSERT INTO events VALUES (:at, 'acme', 'p', 'Activate', 'r', :changes, 0, '')"), event
                )
        engine.dispose()
        database.migrate(url)
        engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            if "postgres" in url:
                connection.execute(sa.text("SELECT set_config('backpack.tenant', '*', true)"))
            found = connection.execute(sa.text("SELECT tenant, number, served FROM release_statuses ORDER BY number"))
            assert [(t, n, bool(s)) for t, n, s in found] == [("acme", 0, True), ("acme", 1, True), ("acme", 3, True)]
        engine.dispose()
        open_store(url).close()
