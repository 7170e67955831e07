"""Every way in which a request can be refused, and the one table of what each means to a caller.

    ServiceError
    ├── InvalidRequest      the request can't be carried out as it is written (with field violations)
    ├── NotFound            it names something that isn't there
    ├── AlreadyExists       it makes something that is there already
    ├── Conflict            what it was based on has changed: read again, then retry the whole change
    ├── PreconditionFailed  the system isn't in the state it needs
    ├── Unauthenticated     no credential, or not a good one
    ├── Forbidden           a good credential for something else
    ├── Exhausted           too much of it; retry after a while
    ├── Unavailable         not now; a retry may succeed elsewhere
    ├── Expired             the deadline passed
    ├── DataLoss            stored bytes are not what was stored
    └── Internal            our own mistake

No transport here: `rpc/` turns these into gRPC statuses and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

from backpack_lm.patch import PatchError, Violation

DOMAIN = "backpack"
"""Domain of every google.rpc.ErrorInfo that we send."""


class Quota(NamedTuple):
    """A limit that was reached: whose, and which."""

    subject: str
    description: str


class ServiceError(Exception):
    """A refusal: `reason` is a stable word for programs, the message is for people and says the fix.

    `code` is the canonical status name (google.rpc.Code). `metadata` holds the offending values. `why` is for who
    operates the service: it is logged, and shown by commands, and never sent to a caller.
    """

    code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        violations: Iterable[Violation] = (),
        quotas: Iterable[Quota] = (),
        retry_after: float | None = None,
        why: str = "",
        **metadata: object,
    ) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message
        self.violations, self.quotas = tuple(violations), tuple(quotas)
        self.retry_after, self.why = retry_after, why
        self.metadata: Mapping[str, str] = {name: str(value) for name, value in metadata.items()}


class InvalidRequest(ServiceError):
    code = "INVALID_ARGUMENT"

    @classmethod
    def at(cls, field: str, reason: str, description: str) -> InvalidRequest:
        """One field that is wrong."""
        return cls.of(Violation(field, reason, description))

    @classmethod
    def of(cls, *violations: Violation) -> InvalidRequest:
        """Several fields that are wrong; the reason is the first one's."""
        text = "; ".join(f"{v.field}: {v.description}" for v in violations)
        return cls(violations[0].reason, text, violations=violations)

    def within(self, field: str) -> InvalidRequest:
        """The same, of fields of a message that is called `field`."""
        return self.of(*(Violation(f"{field}.{v.field}", v.reason, v.description) for v in self.violations))


class NotFound(ServiceError):
    code = "NOT_FOUND"


class AlreadyExists(ServiceError):
    code = "ALREADY_EXISTS"


class Conflict(ServiceError):
    code = "ABORTED"


class PreconditionFailed(ServiceError):
    code = "FAILED_PRECONDITION"


class Unauthenticated(ServiceError):
    code = "UNAUTHENTICATED"


class Forbidden(ServiceError):
    code = "PERMISSION_DENIED"


class Exhausted(ServiceError):
    code = "RESOURCE_EXHAUSTED"


class Unavailable(ServiceError):
    code = "UNAVAILABLE"


class Expired(ServiceError):
    code = "DEADLINE_EXCEEDED"


class DataLoss(ServiceError):
    code = "DATA_LOSS"


class Internal(ServiceError):
    code = "INTERNAL"


BY_CODE: Mapping[str, type[ServiceError]] = {kind.code: kind for kind in ServiceError.__subclasses__()}

INTERNAL_CALL_ERRORS = (Unavailable, Expired, Unauthenticated, Forbidden)
"""Errors of a call that we make on our own account. A caller must not receive them as errors of its own request."""

RELEASE_UNREACHABLE = "RELEASE_UNREACHABLE"
"""Reason of an Unavailable: this replica serves, but can't get this release now; another may have it."""

TOPICS_NOT_READY = "TOPICS_NOT_READY"
"""Reason of an Unavailable: this replica serves, and computes what all topics need; another may do the same."""


def no_canary(channel: str, why: str = "") -> PreconditionFailed:
    """A channel's canary is asked for, and it has none; `why` says what became of the last one."""
    return PreconditionFailed("NO_CANARY", f"{channel} has no canary{why}; start one first")


def release_deleted(release: str) -> NotFound:
    """A release is asked for that is deleted."""
    return NotFound("RELEASE_DELETED", f"{release} is deleted; create it again, under another number")


_PRECONDITIONS = {"WRONG_MODEL"}


def from_patch_error(error: PatchError, prefix: str = "") -> ServiceError:
    """A refused patch as a refusal of the request: another model's patch isn't malformed, but can't apply."""
    violations = tuple(Violation(prefix + v.field, v.reason, v.description) for v in error.violations)
    if violations[0].reason in _PRECONDITIONS:
        return PreconditionFailed(violations[0].reason, str(error), violations=violations)
    if violations[0].reason == "CORRUPT":
        return DataLoss("CORRUPT", str(error), violations=violations)
    return InvalidRequest.of(*violations)
