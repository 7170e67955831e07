"""A complete store in memory, for tests: every test of a store runs on it as well."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

from backpack_serving.interventions.records import IMMUTABLE, KINDS, EventRecord, Record, ReplyRecord, key_of
from backpack_serving.interventions.store import Read, Write, ignore_message
from backpack_serving.references import Position

R = TypeVar("R")


class Tables:
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
            keys = (
                keys[: bisect.bisect_left(places, after)] if descending else keys[bisect.bisect_right(places, after) :]
            )
        if descending:
            keys.reverse()
        return [seen[key] for key in keys[:limit]]

    def find(self, kind: type[R], **equal: Any) -> R | None:
        for _, record in sorted(self._seen(kind).items()):
            if all(getattr(record, name) == value for name, value in equal.items()):
                found: R = record
                return found
        return None

    def values(self, kind: type[Any], name: str) -> set[Any]:
        return {getattr(record, name) for record in self._seen(kind).values()}

    def add(self, record: Record) -> None:
        key = key_of(record)
        self._check_tenant(record)
        assert key not in self.tables[type(record)], f"{type(record).__name__} {key} is there already"
        self.tables[type(record)][key] = record

    def replace(self, record: Record) -> None:
        self._check_tenant(record)
        assert type(record) not in IMMUTABLE or key_of(record) not in self.tables[type(record)], "it never changes"
        self.tables[type(record)][key_of(record)] = record

    def log(self, event: EventRecord) -> None:
        event = replace(event, revision=self.position.revision)
        self.hash = event.chained(self.hash)
        self.add(replace(event, hash=self.hash))

    def forget_replies(self, before: datetime) -> None:
        kept = {key: reply for key, reply in self.tables[ReplyRecord].items() if reply.created >= before}
        self.tables[ReplyRecord] = kept

    def begin(self, epoch: int) -> None:
        self.position = replace(self.position, epoch=epoch)

    def seen_by(self, tenant: str | None) -> Tables:
        return Tables(self.position, self.hash, self.tables, tenant)

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
        self.tables = Tables(Position(1, 0), "", {kind: {} for kind in KINDS})
        self._lock = threading.Lock()

    @contextmanager
    def read(self, tenant: str | None = None) -> Iterator[Read]:
        yield self.tables.seen_by(tenant)

    @contextmanager
    def write(self, tenant: str | None = None) -> Iterator[Write]:
        with self._lock:
            now = self.tables
            position = Position(now.position.epoch, now.position.revision + 1)
            tables = {kind: dict(table) for kind, table in now.tables.items()}
            copy = Tables(position, now.hash, tables, tenant)
            yield copy
            self.tables = Tables(copy.position, copy.hash, copy.tables)

    def listen(
        self,
        on_write: Callable[[], None],
        on_failure: Callable[[str], None],
        on_message: Callable[[str], None] = ignore_message,
    ) -> None:
        pass  # nobody else writes to this memory, and it doesn't fail

    def publish(self, texts: Sequence[str]) -> None:
        pass

    def close(self) -> None:
        pass
