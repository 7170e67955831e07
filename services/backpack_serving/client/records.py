"""What the intervention service has on record: patches, revisions, releases, the audit trail; tenants and keys.

`name` is a record's whole name, such as tenants/clinic/patches/royal; `id` or `number` is what methods take.
Times are in UTC.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from backpack_proto.v1 import interventions_pb2 as pb

from backpack_serving.auth.keys import Role
from backpack_serving.client.edits import Edit, read


@dataclass(frozen=True, slots=True)
class Patch:
    """A named list of revisions; `newest` is the number of the last one, 0 if there is none."""

    name: str
    description: str
    made: datetime
    newest: int
    deleted: bool

    @property
    def id(self) -> str:
        return last(self.name)

    @classmethod
    def of(cls, m: pb.Patch) -> Patch:
        return cls(m.name, m.description, time(m.create_time), m.latest_revision, m.deleted)


@dataclass(frozen=True, slots=True)
class Revision:
    """Edits that never change, for one model. `edits` are empty in lists and after an upload."""

    name: str
    digest: str
    model: str
    edits: tuple[Edit, ...]
    made: datetime

    @property
    def id(self) -> str:
        """PATCH:NUMBER, as `create_release` takes it."""
        return _revision_id(self.name)

    @property
    def number(self) -> int:
        return int(last(self.name))

    @classmethod
    def of(cls, m: pb.Revision) -> Revision:
        return cls(m.name, m.digest, m.model_fingerprint, tuple(map(read, m.edits)), time(m.create_time))


@dataclass(frozen=True, slots=True)
class ReleaseJudgement:
    """The perplexity of so many tokens of ordinary text, of the model unpatched and under a release."""

    tokens: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """As a share of it: 0.05 is 5 % more."""
        return self.after / self.before - 1


@dataclass(frozen=True, slots=True)
class Release:
    """Revisions that apply together, in this order, each as PATCH:NUMBER. None of them: the model unpatched.

    `judgement` is None until a gateway has had the release judged. `served`: a channel was at it, or had it as its
    canary; if none was, it can be deleted.
    """

    name: str
    number: int
    digest: str
    revisions: tuple[str, ...]
    notes: str
    made: datetime
    judgement: ReleaseJudgement | None = None
    served: bool = False
    deleted: bool = False

    @classmethod
    def of(cls, m: pb.Release) -> Release:
        judgement, j = None, m.judgement
        if m.HasField("judgement"):
            judgement = ReleaseJudgement(j.tokens, j.perplexity_before, j.perplexity_after)
        revisions, made = tuple(map(_revision_id, m.revisions)), time(m.create_time)
        return cls(m.name, m.number, m.digest, revisions, m.notes, made, judgement, m.served, m.deleted)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what to what. `revision` is where the store stood with it; `hash` is chained to the entry before.

    `judgement` is, of a channel's move, what was known of the release then, as text.
    """

    revision: int
    time: datetime
    who: str
    tenant: str
    method: str
    resource: str
    hash: str
    judgement: str = ""

    @classmethod
    def of(cls, m: pb.AuditEntry) -> AuditEntry:
        return cls(m.revision, time(m.time), m.principal, last(m.tenant), m.method, m.resource, m.hash, m.judgement)


@dataclass(frozen=True, slots=True)
class Chain:
    """Whether all audit entries are what they were; else the revision of the first that isn't."""

    entries: int
    first_broken: int | None

    @property
    def intact(self) -> bool:
        return self.first_broken is None

    @classmethod
    def of(cls, m: pb.VerifyChainResponse) -> Chain:
        return cls(m.entries, m.first_broken if m.HasField("first_broken") else None)


@dataclass(frozen=True, slots=True)
class Tenant:
    """`suspended`: none of its keys is good for anything."""

    name: str
    made: datetime
    suspended: bool

    @property
    def id(self) -> str:
        return last(self.name)

    @classmethod
    def of(cls, m: pb.Tenant) -> Tenant:
        return cls(m.name, time(m.create_time), m.suspended)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key, without its secret."""

    name: str
    roles: tuple[Role, ...]
    made: datetime
    revoked: bool

    @property
    def id(self) -> str:
        return last(self.name)

    @classmethod
    def of(cls, m: pb.ApiKey) -> ApiKey:
        roles = tuple(Role(pb.Role.Name(role).removeprefix("ROLE_").lower()) for role in m.roles)
        return cls(m.name, roles, time(m.create_time), m.revoked)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made; nobody tells its secret again."""

    key: ApiKey
    secret: str = field(repr=False)

    @classmethod
    def of(cls, m: Any) -> NewKey:
        return cls(ApiKey.of(m.key), m.secret)


def last(name: str) -> str:
    """The last part of a resource's name."""
    return name.rpartition("/")[2]


def time(stamp: Any) -> datetime:
    made: datetime = stamp.ToDatetime(UTC)
    return made


def _revision_id(name: str) -> str:
    *_, patch, _, number = name.split("/")
    return f"{patch}:{number}"
