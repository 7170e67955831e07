"""The protocol that every store implements.

A store runs one write transaction at a time. A write moves the head (epoch, revision, hash) on by exactly one
and adds exactly one event, in the same transaction as what it stores; one that raises leaves nothing behind.
A transaction for one tenant sees and touches that tenant's records alone, whatever it asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Protocol, TypeVar

from backpack_serving.interventions.records import EventRecord, Record
from backpack_serving.references import Position

R = TypeVar("R")

MAX_MESSAGE_BYTES = 7_900
"""Most bytes of one message to other processes: PostgreSQL's NOTIFY carries no more."""


def ignore_message(text: str) -> None:
    """A listener that ignores messages of other processes."""


class Read(Protocol):
    """A consistent view of the store."""

    @property
    def position(self) -> Position: ...

    @property
    def hash(self) -> str:
        """The hash of the last event."""

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
        """The first record, in key order, with these field values, or None."""

    def values(self, kind: type[Any], name: str) -> set[Any]:
        """The different values that a field has in the records of a kind."""


class Write(Read, Protocol):
    """A write transaction. `position` is already that of the revision that it will commit."""

    def add(self, record: Record) -> None:
        """Store a new record. Its key must be free: an AssertionError is our own mistake."""

    def replace(self, record: Record) -> None:
        """Replace the record with the same key. An immutable kind is an AssertionError."""

    def log(self, event: EventRecord) -> None:
        """Add this write's event; its revision and hash are set here."""

    def forget_replies(self, before: datetime) -> None: ...

    def begin(self, epoch: int) -> None:
        """Make this write the first of a higher epoch."""


class Store(Protocol):
    """Transactions, and messages between processes with the same store. Raises Unavailable while it can't be used."""

    def read(self, tenant: str | None = None) -> AbstractContextManager[Read]:
        """A transaction that sees one state of the store: one tenant's records, or everybody's (None)."""

    def write(self, tenant: str | None = None) -> AbstractContextManager[Write]:
        """A transaction that is durably committed when the block ends, and rolled back if the block raises.

        Raises Unavailable if the outcome is unknown: the write may have happened then.
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
        """Send messages of at most MAX_MESSAGE_BYTES to the other processes that listen. Nothing is stored."""

    def close(self) -> None: ...
