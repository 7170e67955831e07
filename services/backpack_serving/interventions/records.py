"""The records that the intervention service stores: one frozen class a kind, identified by its KEY fields.

Records hold plain values only, so a store needs to know nothing of what they mean. Blobs, revisions, releases and
events never change; the others are replaced whole, and an event tells every replacement.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, ClassVar, get_args

from backpack_serving.auth.keys import Principal, Role, Verifier
from backpack_serving.references import ReleaseRef
from backpack_serving.sync.state import CanarySplit, ChannelState, KeyState


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """`suspended`: none of its keys is good for anything until it is resumed."""

    tenant: str
    created: datetime
    suspended: bool = False
    KEY: ClassVar = ("tenant",)

    @property
    def name(self) -> str:
        return f"tenants/{self.tenant}"


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key without its secret. `roles` are separated by spaces."""

    tenant: str
    key: str
    roles: str
    salt: bytes
    verifier: bytes
    created: datetime
    revoked: bool = False
    KEY: ClassVar = ("tenant", "key")

    @property
    def name(self) -> str:
        return f"tenants/{self.tenant}/keys/{self.key}"

    @property
    def state(self) -> KeyState:
        """The key as gateways see it: its principal, and the verifier of its secret."""
        who = Principal(self.tenant, self.key, frozenset(map(Role, self.roles.split())))
        return KeyState(who, Verifier(self.salt, self.verifier), self.revoked)


@dataclass(frozen=True, slots=True)
class PatchRecord:
    """`deleted` is a tombstone: releases keep what they were made of, and the name is never used again."""

    tenant: str
    patch: str
    description: str
    created: datetime
    deleted: bool = False
    KEY: ClassVar = ("tenant", "patch")

    @property
    def name(self) -> str:
        return f"tenants/{self.tenant}/patches/{self.patch}"


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """The canonical bytes of a `backpack_lm.patch.Revision`; `digest` is their SHA-256, in hex."""

    tenant: str
    digest: str
    data: bytes
    KEY: ClassVar = ("tenant", "digest")

    @property
    def intact(self) -> bool:
        return hashlib.sha256(self.data).hexdigest() == self.digest


@dataclass(frozen=True, slots=True)
class RevisionRecord:
    """A revision of a patch: its number, and the digest of its blob."""

    tenant: str
    patch: str
    number: int
    digest: str
    fingerprint: str
    created: datetime
    KEY: ClassVar = ("tenant", "patch", "number")

    @property
    def name(self) -> str:
        return f"tenants/{self.tenant}/patches/{self.patch}/revisions/{self.number}"


@dataclass(frozen=True, slots=True)
class ReleaseRecord:
    """`revisions` are (patch, number) pairs, in the order in which they apply, as JSON."""

    tenant: str
    number: int
    digest: str
    revisions: str
    notes: str
    created: datetime
    KEY: ClassVar = ("tenant", "number")

    @property
    def name(self) -> str:
        return f"tenants/{self.tenant}/releases/{self.number}"

    @property
    def ref(self) -> ReleaseRef:
        return ReleaseRef(self.number, self.digest)

    @property
    def parts(self) -> list[tuple[str, int]]:
        return [(patch, number) for patch, number in json.loads(self.revisions)]


@dataclass(frozen=True, slots=True)
class ReleaseStatusRecord:
    """What became of a release. `tokens` of held-out text have the perplexity `before` unpatched and `after` under
    the release; 0 if nobody has judged it. `served`: a channel was at it, or had it as its canary. `deleted` is a
    tombstone: the number is never used again.
    """

    tenant: str
    number: int
    tokens: int = 0
    before: float = 0.0
    after: float = 0.0
    served: bool = False
    deleted: bool = False
    KEY: ClassVar = ("tenant", "number")

    @property
    def change(self) -> float:
        """Of the perplexity, as a share of it: 0.05 is 5 % more; 0 if nobody has judged the release."""
        return self.after / self.before - 1 if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class ChannelRecord:
    """The pointer. `earlier` are the releases that it was at before, (number, digest) as JSON, newest first;
    `moved` is the store's revision that moved it last; `aborted` says why the service ended its last canary;
    `judgement` is what was known of the release that it moved to last.
    """

    tenant: str
    channel: str
    release: int
    digest: str
    previous: int | None
    generation: int
    updated: datetime
    earlier: str = "[]"
    moved: int = 0
    canary: int | None = None
    canary_digest: str = ""
    permille: int = 0
    salt: str = ""
    aborted: str = ""
    judgement: str = ""
    KEY: ClassVar = ("tenant", "channel")

    @property
    def name(self) -> str:
        return f"tenants/{self.tenant}/channels/{self.channel}"

    @property
    def etag(self) -> str:
        return f"{self.generation}-{self.digest[:12]}"

    @property
    def numbers(self) -> set[int | None]:
        """Of the releases that it is at, was at before, or has as its canary."""
        return {self.release, self.canary, self.previous, *(number for number, _ in json.loads(self.earlier))}

    @property
    def state(self) -> ChannelState:
        """The channel as gateways and replicas see it: what it points at, without the record's bookkeeping."""
        canary = None
        if self.canary is not None:
            canary = CanarySplit(ReleaseRef(self.canary, self.canary_digest), self.permille, self.salt)
        earlier = tuple(ReleaseRef(*pair) for pair in json.loads(self.earlier))
        return ChannelState(self.tenant, self.channel, ReleaseRef(self.release, self.digest), canary, earlier)


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One write: the entry of the watch and of the audit trail. `changes` is a JSON list of what gateways see.

    `hash` chains it to the event before: nothing can be altered, removed or inserted without breaking it.
    """

    revision: int
    tenant: str
    principal: str
    method: str
    resource: str
    changes: str
    time: datetime
    hash: str = ""
    KEY: ClassVar = ("revision",)

    def chained(self, before: str) -> str:
        """The hash of this event, if the event before it has the hash `before`."""
        content = [self.revision, self.tenant, self.principal, self.method, self.resource, self.changes]
        text = json.dumps([before, *content, self.time.isoformat()], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ReplyRecord:
    """The result of a request with an id, for its repetitions. `resource` is a record's kind and key, as JSON."""

    principal: str
    method: str
    request_id: str
    body: str
    resource: str
    revision: int
    created: datetime
    KEY: ClassVar = ("principal", "method", "request_id")


Record = (
    TenantRecord
    | KeyRecord
    | PatchRecord
    | BlobRecord
    | RevisionRecord
    | ReleaseRecord
    | ReleaseStatusRecord
    | ChannelRecord
    | EventRecord
    | ReplyRecord
)
KINDS: tuple[type[Any], ...] = get_args(Record)
IMMUTABLE: tuple[type[Any], ...] = (BlobRecord, RevisionRecord, ReleaseRecord, EventRecord)
"""Kinds that are never changed or removed."""


def kind_name(kind: type[Any]) -> str:
    """The name of a kind in events and replies. It must never change: digests depend on it."""
    return kind.__name__.removesuffix("Record")


def visible(record: Record) -> dict[str, Any]:
    """A record as JSON values with its kind, as events contain it."""
    values = asdict(record)
    for name, value in values.items():
        if isinstance(value, bytes):
            values[name] = value.hex()
        elif isinstance(value, datetime):
            values[name] = value.isoformat()
    return {"kind": kind_name(type(record)), **values}


def record_from(values: dict[str, Any]) -> Record | None:
    """The record in an event: the inverse of `visible`. None for a kind that this version does not know.

    Fields that older events lack have their defaults; fields that this version does not know are ignored.
    """
    kind = next((kind for kind in KINDS if kind_name(kind) == values["kind"]), None)
    if kind is None:
        return None
    read: dict[str, Callable[[Any], Any]] = {"bytes": bytes.fromhex, "datetime": datetime.fromisoformat}
    given = {field.name: (str(field.type), values[field.name]) for field in fields(kind) if field.name in values}
    record: Record = kind(**{name: read.get(how, lambda value: value)(value) for name, (how, value) in given.items()})
    return record


def key_of(record: Record) -> tuple[Any, ...]:
    return tuple(getattr(record, name) for name in record.KEY)
