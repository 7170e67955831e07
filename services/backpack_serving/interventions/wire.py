"""Tenants, patches, releases, channels and audit: records ↔ messages, resource names, pages."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from backpack_lm import patch
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import interventions_pb2 as pb
from backpack_proto.v1 import sync_pb2
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from backpack_serving.auth.keys import Principal, Role
from backpack_serving.errors import InvalidRequest, NotFound
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.records import (
    ChannelRecord,
    EventRecord,
    KeyRecord,
    PatchRecord,
    ReleaseRecord,
    ReleaseStatusRecord,
    RevisionRecord,
    TenantRecord,
)
from backpack_serving.references import Position, ReleaseRef
from backpack_serving.wire.edits import write_edit
from backpack_serving.wire.references import write_position, write_ref
from backpack_serving.wire.roles import ROLE_NUMBERS, ROLES

PAGE, LARGEST_PAGE = 50, 1000

LONGEST_NAME = 10_000

T = TypeVar("T")


# ---- requests


def parse_name(field: str, name: str, pattern: str, who: Principal) -> tuple[str, ...]:
    """The ids in a resource name such as "patches/{}/revisions/{}", with or without its "tenants/{}/" before.

    Raises InvalidRequest for another form, NotFound for another tenant's: whether it exists is not told.
    """
    if len(name) > LONGEST_NAME:  # of which a megabyte isn't looked through
        raise InvalidRequest.at(
            field, "BAD_NAME", f"{name[:256]!r}… has {len(name)} characters; at most {LONGEST_NAME}"
        )
    form = re.escape(pattern).replace(r"\{\}", r"([^/\0]+)")  # NUL is in no name, and in no database
    match = re.fullmatch(rf"(?:tenants/([^/\0]+)/)?{form}", name)
    if not match:
        shape = pattern.replace("{}", "…")
        if re.fullmatch(rf"(?:tenants/[^/\0]+/)?{form.replace('+', '*')}", name):
            raise InvalidRequest.at(field, "BAD_NAME", f"{name!r} has an empty name in it; write {shape}")
        raise InvalidRequest.at(field, "BAD_NAME", f"{name!r}; write {shape}, or tenants/{who.tenant}/{shape}")
    tenant, *ids = match.groups()
    if tenant not in (None, who.tenant):
        raise NotFound("NOT_YOURS", f"{name} isn't a resource of tenants/{who.tenant}")
    return tuple(ids)


def parse_number(field: str, text: str) -> int:
    """The number in a resource name. Raises InvalidRequest."""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise InvalidRequest.at(field, "BAD_NAME", f"{text!r} is no number")
    return int(text)


def parse_key(field: str, name: str) -> tuple[str, str]:
    """(tenant, key) of a key's name. Operators name keys of every tenant. Raises InvalidRequest."""
    match = re.fullmatch(r"tenants/([^/\0]+)/keys/([^/\0]+)", name)
    if not match:
        raise InvalidRequest.at(field, "BAD_NAME", f"{name!r}; write tenants/…/keys/…")
    return match[1], match[2]


def check_mask(field: str, mask: FieldMask, allowed: Iterable[str]) -> None:
    """Raise InvalidRequest unless every path of a field mask is one of these."""
    if wrong := [path for path in mask.paths if path not in allowed]:
        raise InvalidRequest.at(field, "UNKNOWN_FIELD", f"{wrong[0]!r}; it may name {', '.join(sorted(allowed))}")


def parse_tenant(field: str, name: str) -> str:
    """The tenant of a tenant's name. Raises InvalidRequest."""
    match = re.fullmatch(r"tenants/([^/\0]+)", name)
    if not match:
        raise InvalidRequest.at(field, "BAD_NAME", f"{name!r}; write tenants/…")
    return match[1]


def read_roles(numbers: Sequence[int]) -> list[Role]:
    """Raises InvalidRequest for a number that is no role's."""
    if unknown := [n for n in numbers if n not in ROLES]:
        raise InvalidRequest.at("roles", "UNKNOWN_VALUE", f"{unknown[0]} is no role")
    return [ROLES[n] for n in numbers]  # type: ignore[index]


def read_idempotency_key(request: Message, request_id: str) -> IdempotencyKey:
    """What makes a write recognisable. Only compared within a service version, so protobuf's bytes will do."""
    return IdempotencyKey(request_id, hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest())


def read_page(size: int, token: str, kind: type[T], default: int = PAGE) -> tuple[T | None, int]:
    """(where to go on, how many) of a list request. Raises InvalidRequest for a token that isn't one of ours.

    `default` is the size of a page where the request gives none: LARGEST_PAGE in lists that had no pages once, whose
    callers may know of none.
    """
    if size < 0:
        raise InvalidRequest.at("page_size", "OUT_OF_RANGE", f"{size}; at least 0, which means {default}")
    limit = min(size or default, LARGEST_PAGE)
    if not token:
        return None, limit
    try:
        after = json.loads(base64.urlsafe_b64decode(token))
    except (binascii.Error, ValueError, RecursionError):
        after = None
    if not isinstance(after, kind) or not _storable(after):
        raise InvalidRequest.at("page_token", "BAD_PAGE_TOKEN", f"{token!r} is not from a page of this list")
    return after, limit


def _storable(value: object) -> bool:
    """Whether a database can compare with it: tokens come from outside."""
    if isinstance(value, str):
        return value.isascii() and "\0" not in value  # ids
    return type(value) is int and 0 <= value < 2**63


def page_token(found: Sequence[Any], limit: int, after: Any) -> str:
    """The token of the page that follows; none after a page that wasn't full."""
    return base64.urlsafe_b64encode(json.dumps(after).encode()).decode() if len(found) == limit else ""


# ---- answers


def write_time(value: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(value)
    return stamp


def write_tenant(record: TenantRecord) -> pb.Tenant:
    return pb.Tenant(name=record.name, create_time=write_time(record.created), suspended=record.suspended)


def write_key(record: KeyRecord) -> pb.ApiKey:
    return pb.ApiKey(
        name=record.name,
        roles=[ROLE_NUMBERS[Role(role)] for role in record.roles.split()],
        create_time=write_time(record.created),
        revoked=record.revoked,
    )


def write_patch(record: PatchRecord, latest: int) -> pb.Patch:
    return pb.Patch(
        name=record.name,
        description=record.description,
        create_time=write_time(record.created),
        latest_revision=latest,
        deleted=record.deleted,
    )


def write_revision(
    record: RevisionRecord, edits: Sequence[patch.Edit] = (), tokenizer: Tokenizer | None = None
) -> pb.Revision:
    """A revision; with its edits if they are given, and a tokenizer to spell their words."""
    message = pb.Revision(
        name=record.name,
        digest=record.digest,
        model_fingerprint=record.fingerprint,
        create_time=write_time(record.created),
    )
    if tokenizer is not None:
        message.edits.extend(write_edit(edit, tokenizer) for edit in edits)
    return message


def write_release(record: ReleaseRecord, status: ReleaseStatusRecord) -> pb.Release:
    return pb.Release(
        name=record.name,
        number=record.number,
        digest=record.digest,
        revisions=[f"tenants/{record.tenant}/patches/{p}/revisions/{n}" for p, n in record.parts],
        notes=record.notes,
        create_time=write_time(record.created),
        judgement=write_judgement(status) if status.tokens else None,
        served=status.served,
        deleted=status.deleted,
    )


def write_judgement(status: ReleaseStatusRecord) -> pb.Judgement:
    return pb.Judgement(tokens=status.tokens, perplexity_before=status.before, perplexity_after=status.after)


def write_channel(record: ChannelRecord) -> pb.Channel:
    canary, split = None, record.state.canary
    if split is not None:
        canary = pb.Canary(
            release=split.release.number,
            release_digest=split.release.digest,
            permille=split.permille,
            salt=split.salt,
        )
    return pb.Channel(
        name=record.name,
        release=record.release,
        release_digest=record.digest,
        previous_release=record.previous,
        generation=record.generation,
        etag=record.etag,
        update_time=write_time(record.updated),
        canary=canary,
        canary_abort_reason=record.aborted,
        judgement=record.judgement,
    )


def write_audit_entry(event: EventRecord) -> pb.AuditEntry:
    changes = json.loads(event.changes)
    return pb.AuditEntry(
        revision=event.revision,
        time=write_time(event.time),
        principal=event.principal,
        tenant=f"tenants/{event.tenant}",
        method=event.method,
        resource=event.resource,
        hash=event.hash,
        judgement=next((change["judgement"] for change in changes if change.get("judgement")), ""),
    )


# ---- releases for readers


PIECE = 2**20


def write_pieces(revisions: Sequence[bytes]) -> Iterable[sync_pb2.FetchReleaseResponse]:
    for number, data in enumerate(revisions):
        for at in range(0, len(data), PIECE):
            yield sync_pb2.FetchReleaseResponse(revision=number, data=data[at : at + PIECE])


def write_resolved(position: Position, releases: Iterable[ReleaseRef]) -> sync_pb2.ResolveReleasesResponse:
    return sync_pb2.ResolveReleasesResponse(releases=map(write_ref, releases), position=write_position(position))
