"""Where records are kept: the protocol that every store obeys.

A store runs one write transaction at a time. A write moves the head (epoch, revision, hash) on by exactly one
and adds exactly one event, in the same transaction as what it stores; one that raises leaves nothing behind.
A transaction for one tenant sees and touches that tenant's records alone, whatever it asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Protocol, TypeVar

from backpack_serving.interventions.records import EventRecord, Position, Record

R = TypeVar("R")

MAX_MESSAGE_BYTES = 7_900
"""Bytes of one text for other processes: what PostgreSQL's NOTIFY carries."""


def ignore_message(text: str) -> None:
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

    def log(self, event: EventRecord) -> None:
        """Add this write's event; its revision and hash are set here."""

    def forget_replies(self, before: datetime) -> None: ...

    def begin(self, epoch: int) -> None:
        """Let this write be the first of a higher epoch."""


class Store(Protocol):
    """Transactions, and news of other processes with the same store. Raises Unavailable while it can't be used."""

    def read(self, tenant: str | None = None) -> AbstractContextManager[Read]:
        """See one state of the store: a tenant's records, or everybody's."""

    def write(self, tenant: str | None = None) -> AbstractContextManager[Write]:
        """Committed, and durable, when the block ends; nothing of it is if the block raises.

        Raises Unavailable if that can't be told: the write may have happened then.
        """

    def listen(
        self,
        on_write: Callable[[], None],
        on_failure: Callable[[str], None],
        on_message: Callable[[str], None] = ignore_message,
    ) -> None:
        """Call `on_write`, from any thread, soon after other processes have written; one call may get lost. Call
        `on_failure`, with the reason, when the store will take nothing more until its process is started again. Call
        `on_message` with what other processes `publish`.
        """

    def publish(self, texts: Sequence[str]) -> None:
        """Tell other processes that listen to this store, MOST_TOLD bytes each at most. Nothing is stored."""

    def close(self) -> None: ...
