"""An intervention service on every store that there is, for a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from backpack_lm.patch import Cell, ModelShape, Scale
from backpack_serving.interventions.ledger import Request
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.sql import SQLStore
from backpack_serving.interventions.store import MemoryStore, Store
from backpack_serving.keys import SYSTEM, ApiKey, Principal, Role

SHAPE = ModelShape("ab" * 32, vocab_size=50, num_senses=4, width=8, sense_rms=(1.0,) * 4)
ADMIN = Principal(SYSTEM, "root", frozenset({Role.ADMIN}))
REPLICA = Principal(SYSTEM, "replica", frozenset({Role.REPLICA}))
HALVE = Scale((Cell(3, 1),), 0.5)
REMOVE = Scale((Cell(3, 1), Cell(4, 0)), 0.0)


def releaser(tenant: str) -> Principal:
    return Principal(tenant, "key", frozenset({Role.RELEASER}))


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store: Store = MemoryStore() if request.param == "memory" else SQLStore.open(f"sqlite:///{tmp_path}/i.db")
    yield store
    store.close()


@pytest.fixture
def service(store: Store) -> Interventions:
    service = Interventions(store, SHAPE)
    service.bootstrap(ApiKey.mint(), [Role.ADMIN])
    return service


@pytest.fixture
def acme(service: Interventions) -> Principal:
    service.create_tenant(ADMIN, "acme", Request())
    service.create_patch(releaser("acme"), "debias", "", Request())
    return releaser("acme")
