"""An intervention service on every store that there is, for a tiny model."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.patch import Cell, ModelShape, ScaleEdit
from backpack_serving.auth.keys import SYSTEM, ApiKeySecret, Principal, Role
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.store import Store

from tests.interventions.memory import MemoryStore
from tests.interventions.postgres import Postgres

SHAPE = ModelShape("ab" * 32, vocab_size=50, num_senses=4, width=8, sense_rms=(1.0,) * 4)
ADMIN = Principal(SYSTEM, "root", frozenset({Role.ADMIN}))
REPLICA = Principal(SYSTEM, "replica", frozenset({Role.REPLICA}))
HALVE = ScaleEdit((Cell(3, 1),), 0.5)
REMOVE = ScaleEdit((Cell(3, 1), Cell(4, 0)), 0.0)


def releaser(tenant: str) -> Principal:
    return Principal(tenant, "key", frozenset({Role.RELEASER}))


RULES = {
    "create_tenant": "tenants",
    "create_patch": "patches",
    "create_revision": "patches",
    "create_release": "releases",
    "activate": "channels",
    "rollback": "channels",
}
"""Where each write is that tests name by its method."""


def operation(service: Interventions, method: str) -> Callable[..., Any]:
    return getattr(getattr(service, RULES[method]), method)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", autouse=True)
def nothing_left_open() -> Iterator[None]:
    """What a file's tests leave open fails there, not in whichever test the collector comes to run."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One PostgreSQL for all tests of a session. Those that kill one start their own."""
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite database to copy: migrating takes longer than most tests."""
    path = tmp_path_factory.mktemp("template") / "i.db"
    open_store(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def sqlite_url(migrated_file: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(migrated_file, tmp_path)}"


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    return postgres.clean()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """Of a new database of every kind that there is."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """A new store of every kind that there is."""
    memory = request.param == "memory"
    store: Store = MemoryStore() if memory else open_store(request.getfixturevalue(f"{request.param}_url"))
    yield store
    store.close()


@pytest.fixture
def service(store: Store) -> Interventions:
    service = Interventions(store, SHAPE)
    service.tenants.bootstrap(ApiKeySecret.mint(), [Role.ADMIN])
    return service


@pytest.fixture
def acme(service: Interventions) -> Principal:
    service.tenants.create_tenant(ADMIN, "acme", IdempotencyKey())
    service.patches.create_patch(releaser("acme"), "debias", "", IdempotencyKey())
    return releaser("acme")
