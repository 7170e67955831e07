"""Where records are kept: the protocol every store obeys, and a complete store in memory.

A store runs one write transaction at a time. A write moves the head (epoch, revision, hash) on by exactly one
and adds exactly one event, in the same transaction as what it stores; one that raises leaves nothing behind.
A transaction for one tenant sees and touches that tenant's records alone, whatever it asks for.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol, TypeVar

from backpack_serving.interventions.records import IMMUTABLE, KINDS, Event, Position, Record, Reply, key_of

R = TypeVar("R")

MOST_TOLD = 7_900
"""Bytes of one text for other processes: what PostgreSQL's NOTIFY carries."""


def ignored(text: str) -> None:
    """Who doesn't care what other processes tell."""


class Read(Protocol):
    """A consistent view of the store."""

    @property
    def position(self) -> Position: ...

    @property
    def hash(self) -> str:
        """Of the last event."""

    def get(self, kind: type[R], *key: Any) -> R | None:
        """The record with this whole key, or None."""

    def list(
        self,
        kind: type[R],
        *prefix: Any,
        after: Any = None,
        limit: int | None = None,
        descending: bool = False,
    ) -> list[R]:
        """Records whose key begins with `prefix`, ordered by the next key field, beyond `after` in that order."""

    def find(self, kind: type[R], **equal: Any) -> R | None:
        """The first record, by key, with these field values, or None."""


class Write(Read, Protocol):
    """A transaction. `position` is already the one that it will have made."""

    def add(self, record: Record) -> None:
        """Store a new record. Its key must be free: an AssertionError is our own mistake."""

    def replace(self, record: Record) -> None:
        """Store a record in place of the one with its key. What never changes is an AssertionError, too."""

    def log(self, event: Event) -> None:
        """Add this write's event; its revision and hash are set here."""

    def forget_replies(self, before: datetime) -> None: ...

    def begin(self, epoch: int) -> None:
        """Let this write be the first of a higher epoch."""


class Store(Protocol):
    def read(self, tenant: str | None = None) -> AbstractContextManager[Read]:
        """See one state of the store: a tenant's records, or everybody's."""

    def write(self, tenant: str | None = None) -> AbstractContextManager[Write]:
        """Committed, and durable, when the block ends; nothing of it is if the block raises.

        Raises Unavailable if that can't be told: the write may have happened then.
        """

    def listen(
        self, heard: Callable[[], None], failed: Callable[[str], None], told: Callable[[str], None] = ignored
    ) -> None:
        """Call `heard`, from any thread, soon after other processes have written; one call may get lost. Call
        `failed`, with the reason, when the store will take nothing more until its process is started again. Call
        `told` with what other processes `tell`.
        """

    def tell(self, texts: Sequence[str]) -> None:
        """Tell other processes that listen to this store, MOST_TOLD bytes each at most. Nothing is stored."""

    def close(self) -> None: ...


class _Tables:
    """Records in dictionaries; the write side works on a copy that a commit puts in place."""

    def __init__(
        self,
        position: Position,
        hash_: str,
        tables: dict[type[Any], dict[tuple[Any, ...], Any]],
        tenant: str | None = None,
    ) -> None:
        self.position, self.hash, self.tables, self._tenant = position, hash_, tables, tenant

    def get(self, kind: type[R], *key: Any) -> R | None:
        record: R | None = self._seen(kind).get(key)
        return record

    def list(
        self,
        kind: type[R],
        *prefix: Any,
        after: Any = None,
        limit: int | None = None,
        descending: bool = False,
    ) -> list[R]:
        size, seen = len(prefix), self._seen(kind)
        keys = sorted(key for key in seen if key[:size] == prefix)
        if after is not None:
            places = [key[size] for key in keys]
            if descending:
                keys = keys[: bisect.bisect_left(places, after)]
            else:
                keys = keys[bisect.bisect_right(places, after) :]
        if descending:
            keys.reverse()
        return [seen[key] for key in keys[:limit]]

    def find(self, kind: type[R], **equal: Any) -> R | None:
        for _, record in sorted(self._seen(kind).items()):
            if all(getattr(record, name) == value for name, value in equal.items()):
                found: R = record
                return found
        return None

    def add(self, record: Record) -> None:
        key = key_of(record)
        self._check_tenant(record)
        assert key not in self.tables[type(record)], f"{type(record).__name__} {key} is there already"
        self.tables[type(record)][key] = record

    def replace(self, record: Record) -> None:
        self._check_tenant(record)
        assert type(record) not in IMMUTABLE or key_of(record) not in self.tables[type(record)], "it never changes"
        self.tables[type(record)][key_of(record)] = record

    def log(self, event: Event) -> None:
        event = replace(event, revision=self.position.revision)
        self.hash = event.chained(self.hash)
        self.add(replace(event, hash=self.hash))

    def forget_replies(self, before: datetime) -> None:
        kept = {key: reply for key, reply in self.tables[Reply].items() if reply.created >= before}
        self.tables[Reply] = kept

    def begin(self, epoch: int) -> None:
        self.position = replace(self.position, epoch=epoch)

    def seen_by(self, tenant: str | None) -> _Tables:
        return _Tables(self.position, self.hash, self.tables, tenant)

    def _seen(self, kind: type[Any]) -> dict[tuple[Any, ...], Any]:
        table = self.tables[kind]
        if self._tenant is None or not hasattr(kind, "tenant"):
            return table
        return {key: record for key, record in table.items() if record.tenant == self._tenant}

    def _check_tenant(self, record: Record) -> None:
        of = getattr(record, "tenant", self._tenant)
        assert self._tenant in (None, of), f"a write of {self._tenant} touches {of}"


class MemoryStore:
    """A store that forgets everything when its process ends. It passes every test that the others pass."""

    def __init__(self) -> None:
        self._now = _Tables(Position(1, 0), "", {kind: {} for kind in KINDS})
        self._lock = threading.Lock()

    @contextmanager
    def read(self, tenant: str | None = None) -> Iterator[Read]:
        yield self._now.seen_by(tenant)

    @contextmanager
    def write(self, tenant: str | None = None) -> Iterator[Write]:
        with self._lock:
            now = self._now
            position = Position(now.position.epoch, now.position.revision + 1)
            tables = {kind: dict(table) for kind, table in now.tables.items()}
            copy = _Tables(position, now.hash, tables, tenant)
            yield copy
            self._now = _Tables(copy.position, copy.hash, copy.tables)

    def listen(
        self, heard: Callable[[], None], failed: Callable[[str], None], told: Callable[[str], None] = ignored
    ) -> None:
        pass  # nobody else writes to this memory, and it doesn't fail

    def tell(self, texts: Sequence[str]) -> None:
        pass

    def close(self) -> None:
        pass
