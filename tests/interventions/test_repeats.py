"""P3 and P4 in any order of things: hypothesis plays a client, its failures and the clock against a model.

Every request has an id. Its answer may be lost after the commit, or the service may die before it; then it is
sent again, at once or much later, and must have had one effect. The model is what a reader of the docs expects.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from backpack_lm.patch import Cell, ScaleEdit
from backpack_serving.auth.keys import Principal, Role
from backpack_serving.errors import Conflict, InvalidRequest
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.ledger import REPLIES_KEPT, IdempotencyKey, verify_chain
from backpack_serving.interventions.records import EventRecord, ReplyRecord
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.store import Store, Write
from backpack_serving.references import LIVE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.interventions.conftest import ADMIN, SHAPE, operation
from tests.interventions.memory import MemoryStore
from tests.interventions.postgres import Postgres

TENANTS = ("acme", "other")
METHODS = ("create_patch", "create_revision", "create_release", "activate", "rollback")


class Lost(Exception):
    """The answer, or the whole service, is gone; the caller knows nothing."""


@dataclass
class Sent:
    """A request as it was sent, and what it did: (resource, etag or digest, revision of the store), once known."""

    who: Principal
    method: str
    arguments: tuple[Any, ...]
    request: IdempotencyKey
    time: datetime
    effect: tuple[str, str, int] | None = None


class Machine(RuleBasedStateMachine):
    """One service, two tenants, two keys each."""

    open: ClassVar[Any]

    def __init__(self) -> None:
        super().__init__()
        self._opened = type(self).open()
        self._opened.__enter__()
        self.now = datetime(2026, 11, 24, tzinfo=UTC)
        self.losing = ""
        self.sent: list[Sent] = []
        self.ids = 0
        self.effects = 0
        self.patches: dict[str, list[str]] = {t: [] for t in TENANTS}
        self.revisions: dict[tuple[str, str], int] = {}
        self.releases = dict.fromkeys(TENANTS, 0)
        self.live: dict[str, list[int]] = {t: [0] for t in TENANTS}
        self.generation = dict.fromkeys(TENANTS, 1)

    def _serve(self) -> None:
        self.store = self._opened.store
        self._write, self.store.write = self.store.write, self._dying_write  # type: ignore[method-assign]
        self.service = Interventions(self.store, SHAPE, on_write=self._after_commit, now=lambda: self.now)

    @initialize()
    def begin(self) -> None:
        self._serve()
        for tenant in TENANTS:
            self.service.tenants.create_tenant(ADMIN, tenant, IdempotencyKey())
        self.effects = len(TENANTS)

    def teardown(self) -> None:
        self._opened.__exit__(None, None, None)

    def _after_commit(self) -> None:
        if self.losing == "answer":
            raise Lost

    @contextmanager
    def _dying_write(self, tenant: str | None = None) -> Iterator[Write]:
        with self._write(tenant) as tx:
            yield tx
            if self.losing == "service":
                raise Lost

    @rule(
        tenant=st.sampled_from(TENANTS),
        key=st.sampled_from("ab"),
        method=st.sampled_from(METHODS),
        number=st.integers(0, 3),
        losing=st.sampled_from(["", "", "answer", "service"]),
    )
    def send(self, tenant: str, key: str, method: str, number: int, losing: str) -> None:
        who = Principal(tenant, key, frozenset({Role.RELEASER}))
        arguments = self._arguments(tenant, method, number)
        if arguments is None:
            return
        self.ids += 1
        request = IdempotencyKey(f"00000000-0000-4000-8000-{self.ids:012}", f"{method}{arguments}")
        sent = Sent(who, method, arguments, request, self.now)
        self.losing = losing
        with suppress(Lost):
            sent.effect = self._first(sent)
        self.losing = ""
        if losing == "service":  # it died before the commit: nothing has happened, and the client tries again
            assert sent.effect is None
            sent.effect = self._first(sent)
        self._expect(sent)
        self.sent.append(sent)

    def _arguments(self, tenant: str, method: str, number: int) -> tuple[Any, ...] | None:
        """What a client that has read everything would send; None if that can't be done now."""
        patches = self.patches[tenant]
        match method:
            case "create_patch":
                return (f"p{len(patches)}", "text")
            case "create_revision":
                return (patches[number % len(patches)], (ScaleEdit((Cell(number, 1),), 0.5),)) if patches else None
            case "create_release":
                made = [(p, self.revisions[tenant, p]) for p in patches if self.revisions[tenant, p]]
                return (tuple(made[:number]), "notes")
            case "activate":
                return (LIVE, number % (self.releases[tenant] + 1), self._etag(tenant))
        return (LIVE, self._etag(tenant)) if len(self.live[tenant]) > 1 else None

    def _etag(self, tenant: str) -> str:
        return self.service.channels.get_channel(Principal(tenant, "a", frozenset({Role.AUTHOR})), LIVE).etag

    def _first(self, sent: Sent) -> tuple[str, str, int]:
        written = self._do(sent)
        assert not written.repeated
        return _effect(written)

    def _do(self, sent: Sent) -> Any:
        return operation(self.service, sent.method)(sent.who, *sent.arguments, sent.request)

    def _expect(self, sent: Sent) -> None:
        """What the write must have done, seen by the model."""
        tenant, first = sent.who.tenant, sent.arguments[0]
        self.effects += 1
        if sent.method == "create_patch":
            self.patches[tenant].append(first)
            self.revisions[tenant, first] = 0
        elif sent.method == "create_revision":
            self.revisions[tenant, first] += 1
        elif sent.method == "create_release":
            self.releases[tenant] += 1
        else:
            history = self.live[tenant]
            now = sent.arguments[1] if sent.method == "activate" else history[-2]
            if now != history[-1]:  # to be where it is already changes no channel's past
                history.append(now)
            self.generation[tenant] += 1

    @precondition(lambda self: self.sent)
    @rule(which=st.integers(0, 100), lost=st.booleans())
    def repeat(self, which: int, lost: bool) -> None:
        """The same request again, within a day: it does nothing, and the answer is the first one's."""
        sent = self.sent[-1 - which % len(self.sent)]
        if self.now - sent.time >= REPLIES_KEPT:
            return
        self.losing = "answer" if lost else ""  # a repetition commits nothing, so it can't be lost after it
        written = self._do(sent)
        self.losing = ""
        assert written.repeated
        assert sent.effect in (None, _effect(written)), "the answer is the same for ever"
        sent.effect = _effect(written)

    @precondition(lambda self: self.sent)
    @rule(which=st.integers(0, 100), part=st.sampled_from(["body", "key", "tenant", "method"]))
    def reuse(self, which: int, part: str) -> None:
        """The id of another request: with another body an error; of another caller or method, another request."""
        sent = self.sent[-1 - which % len(self.sent)]
        if self.now - sent.time >= REPLIES_KEPT:
            return
        if part == "body":
            with pytest.raises(InvalidRequest, match="used for another request"):
                self._do(Sent(sent.who, sent.method, sent.arguments, IdempotencyKey(sent.request.id, "x"), self.now))
            return
        tenant = sent.who.tenant if part != "tenant" else next(t for t in TENANTS if t != sent.who.tenant)
        who = Principal(tenant, "c" if part == "key" else sent.who.key, frozenset({Role.RELEASER}))
        if part == "method" and sent.method == "create_patch":
            return  # what follows is a CreatePatch
        name = f"p{len(self.patches[tenant])}"
        other = Sent(who, "create_patch", (name, "text"), IdempotencyKey(sent.request.id, "another"), self.now)
        if any((o.who, o.method, o.request.id) == (who, "create_patch", sent.request.id) for o in self.sent):
            return
        if part == "tenant" and sent.method != "create_patch":
            return
        try:
            other.effect = self._first(other)
        except InvalidRequest as error:
            raise AssertionError(f"the id of another request, and another's: {error}") from error
        self._expect(other)
        self.sent.append(other)

    @precondition(lambda self: any(len(h) > 1 for h in self.live.values()))
    @rule(tenant=st.sampled_from(TENANTS), back=st.integers(1, 3))
    def stale(self, tenant: str, back: int) -> None:
        """P4: an etag from before somebody's change is refused, and changes nothing."""
        if self.generation[tenant] == 1:
            return
        etag = f"{max(1, self.generation[tenant] - back)}-" + self._etag(tenant).split("-")[1]
        who = Principal(tenant, "a", frozenset({Role.RELEASER}))
        with pytest.raises(Conflict):
            self.service.channels.activate(who, LIVE, 0, etag, IdempotencyKey())

    @rule(hours=st.sampled_from([1, 7, 23, 25]))
    def wait(self, hours: int) -> None:
        self.now += timedelta(hours=hours)

    @rule()
    def restart(self) -> None:
        """The service ends, and another goes on with what is stored."""
        self.store.write = self._write  # type: ignore[method-assign]
        self._opened.restart()
        self._serve()

    @invariant()
    def the_store_is_as_expected(self) -> None:
        with self.store.read() as tx:
            assert tx.position.revision == self.effects == len(tx.list(EventRecord)), "one effect for each request"
            assert verify_chain(tx) == (self.effects, None)
        for tenant in TENANTS:
            who = Principal(tenant, "a", frozenset({Role.AUTHOR}))
            found = {p.patch: latest for p, latest in self.service.patches.list_patches(who, None, 1000)}
            assert found == {p: self.revisions[tenant, p] for p in self.patches[tenant]}
            assert self.service.releases.list_releases(who, None, 1)[0][0].number == self.releases[tenant]
            live = self.service.channels.get_channel(who, LIVE)
            assert (live.release, live.generation) == (self.live[tenant][-1], self.generation[tenant])

    @invariant()
    def replies_are_forgotten(self) -> None:
        with self.store.read() as tx:
            last = max((r.created for r in tx.list(ReplyRecord)), default=self.now)
            assert all(r.created >= last - REPLIES_KEPT for r in tx.list(ReplyRecord))


def _effect(written: Any) -> tuple[str, str, int]:
    record = written.record
    return record.name, getattr(record, "etag", getattr(record, "digest", "")), written.position.revision


class Opened:
    """A store that can be closed and opened again."""

    def __init__(self, open_: Any) -> None:
        self._open = open_

    def __enter__(self) -> Store:
        self.store: Store = self._open()
        return self.store

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def restart(self) -> None:
        if not isinstance(self.store, MemoryStore):
            self.store.close()
            self.store = self._open()


class OnFile(Opened):
    """SQLite in a folder of its own."""

    def __init__(self, template: Path) -> None:
        self._folder = Path(tempfile.mkdtemp())
        path = shutil.copy(template, self._folder)
        super().__init__(lambda: open_store(f"sqlite:///{path}"))

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        shutil.rmtree(self._folder)


def check_repeats(open_: Any, examples: int, derandomize: bool = False) -> None:
    """Let hypothesis look for an order of things that breaks a promise, in so many runs."""
    machine = type("Machine", (Machine,), {"open": staticmethod(open_)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=derandomize,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            database=None,
            print_blob=False,
        ),
    )


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def opener(request: pytest.FixtureRequest) -> Any:
    if request.param == "memory":
        return lambda: Opened(MemoryStore)
    if request.param == "sqlite":
        template = request.getfixturevalue("migrated_file")
        return lambda: OnFile(template)
    postgres: Postgres = request.getfixturevalue("postgres")

    def open_() -> Opened:
        url = postgres.clean()
        return Opened(lambda: open_store(url))

    return open_


@pytest.mark.parametrize("examples", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_p3_p4_one_effect_for_each_request(opener: Any, examples: int) -> None:
    check_repeats(opener, examples)
