"""P2 and P4: whatever clients are told at once, one order explains it; writes are gapless, no update is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

import pytest
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.store import Store
from detangle import NotLinearizable, lin

from tests.interventions.histories import Numbers, Pointer, Positions, record
from tests.interventions.postgres import Postgres

CLIENTS, CALLS = 6, 40
LONG = pytest.mark.slow


@pytest.mark.parametrize("rounds", [1, pytest.param(40, marks=LONG)])
def test_p2_p4_histories_have_an_order(store: Store, rounds: int) -> None:
    """Answers are lost now and then: the client can't know whether its write happened."""
    for seed in range(rounds):
        assert record([store], CLIENTS, CALLS, seed).check() > CLIENTS * CALLS / 3


@pytest.mark.parametrize("rounds", [1, pytest.param(25, marks=LONG)])
def test_p2_p4_histories_of_two_services_while_postgres_is_killed(postgres: Postgres, rounds: int) -> None:
    for seed in range(rounds):
        url = postgres.migrated()

        def kill() -> None:
            for _ in range(2):
                time.sleep(0.3)
                postgres.kill()
                postgres.start()

        with closing(open_store(url)) as one, closing(open_store(url)) as two:
            # Fewer than without kills: a client that couldn't read the channel has nothing to move.
            assert record([one, two], CLIENTS, CALLS, seed, meanwhile=kill).check() > CLIENTS * CALLS / 6


def _done(history: lin.History, client: int, f: str, arg: object, output: object) -> None:
    history.ok(history.invoke(client, f, arg), output)


def _two_winners(history: lin.History) -> None:
    _done(history, 1, "move", (1, 3), 2)
    _done(history, 2, "move", (1, 4), 2)


def _a_read_of_the_past(history: lin.History) -> None:
    _done(history, 1, "move", (1, 3), 2)
    _done(history, 2, "read", None, (1, 0))


def _stale_for_no_reason(history: lin.History) -> None:
    _done(history, 1, "move", (1, 3), "stale")


def _a_gap(history: lin.History) -> None:
    _done(history, 1, "write", None, 1)
    _done(history, 1, "write", None, 3)


def _the_same_number_twice(history: lin.History) -> None:
    first, second = history.invoke(1, "write"), history.invoke(2, "write")
    history.ok(first, 1)
    history.ok(second, 1)


def _a_failed_write_seen_twice(history: lin.History) -> None:
    history.info(history.invoke(1, "write"))
    _done(history, 2, "read", None, 2)


def _seen_and_gone(history: lin.History) -> None:
    history.info(history.invoke(1, "write"))
    _done(history, 2, "read", None, 1)
    _done(history, 2, "read", None, 0)


@pytest.mark.parametrize(
    ("model", "bad"),
    [
        (Pointer(), _two_winners),
        (Pointer(), _a_read_of_the_past),
        (Pointer(), _stale_for_no_reason),
        (Positions(), _a_gap),
        (Positions(), _the_same_number_twice),
        (Positions(), _a_failed_write_seen_twice),
        (Numbers(), _seen_and_gone),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else type(value).__name__,
)
def test_p2_the_checker_refuses_what_can_not_be(model: lin.Model, bad: Callable[[lin.History], None]) -> None:
    history = lin.History()
    bad(history)
    with pytest.raises(NotLinearizable):
        history.assert_linearizable(model)


def test_p2_the_checker_allows_what_may_have_happened(store: Store) -> None:
    history = lin.History()
    lost = history.invoke(1, "write")
    _done(history, 2, "read", None, 0)
    history.info(lost)
    _done(history, 2, "read", None, 0)
    _done(history, 2, "read", None, 1)
    history.info(history.invoke(1, "write"))
    _done(history, 2, "read", None, 1)
    history.assert_linearizable(Positions())
