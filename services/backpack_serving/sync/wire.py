"""Sync messages ↔ protobuf; a view ↔ bytes on disk."""

from __future__ import annotations

import sys

from backpack_proto.v1 import sync_pb2 as pb

from backpack_serving.auth.keys import Principal, Verifier
from backpack_serving.errors import InvalidRequest
from backpack_serving.sync import messages as m
from backpack_serving.sync.state import (
    CanarySplit,
    ChannelState,
    KeyState,
    RecentRelease,
    StateEntry,
    StateView,
    TenantState,
    UnknownEntry,
)
from backpack_serving.wire.references import (
    KIND_NUMBERS,
    KINDS,
    read_position,
    read_ref,
    read_refusals,
    read_tally,
    write_position,
    write_ref,
    write_refusal,
    write_tally,
)
from backpack_serving.wire.roles import ROLE_NUMBERS, ROLES

CHANGES = 1_000
"""How many changes of a snapshot travel in one message: about 200 KB, which a reader reads in some milliseconds."""


# ---- from readers


def write_from_reader(message: m.FromReader) -> pb.SyncRequest:
    match message:
        case m.Hello():
            return pb.SyncRequest(
                hello=pb.Hello(
                    kind=KIND_NUMBERS[message.kind],
                    incarnation=message.incarnation,
                    name=message.name,
                    model_fingerprint=message.fingerprint,
                    position=write_position(message.position),
                    whole=message.whole,
                    digests=[bytes.fromhex(digest) for digest in message.digests],
                    refusals=map(write_refusal, message.refusals),
                )
            )
        case m.Ack():
            return pb.SyncRequest(ack=pb.Ack(nonce=message.nonce))
        case m.Nack():
            return pb.SyncRequest(nack=pb.Nack(nonce=message.nonce, refusals=map(write_refusal, message.refusals)))
        case m.ReaderReport():
            return pb.SyncRequest(
                report=pb.Report(
                    refusals=map(write_refusal, message.refusals),
                    tallies=map(write_tally, message.tallies),
                    releases=message.releases,
                )
            )


def read_from_reader(message: pb.SyncRequest) -> m.FromReader:
    """Raises InvalidRequest for a message of a kind that this version doesn't know."""
    match message.WhichOneof("message"):
        case "hello":
            hello = message.hello
            if hello.kind not in KINDS:
                raise InvalidRequest.at("hello.kind", "UNKNOWN_VALUE", f"{hello.kind} is no kind of reader")
            return m.Hello(
                KINDS[hello.kind],
                hello.incarnation,
                hello.name,
                hello.model_fingerprint,
                read_position(hello.position),
                hello.whole,
                frozenset(sys.intern(digest.hex()) for digest in hello.digests),
                read_refusals(hello.refusals),
            )
        case "ack":
            return m.Ack(message.ack.nonce)
        case "nack":
            return m.Nack(message.nack.nonce, read_refusals(message.nack.refusals))
        case "report":
            tallies = tuple(map(read_tally, message.report.tallies))
            return m.ReaderReport(read_refusals(message.report.refusals), tallies, message.report.releases)
        case _:
            raise InvalidRequest.at("message", "UNKNOWN_KIND", "no message that this service knows")


# ---- to readers


def write_to_reader(message: m.Bookmark | m.ResyncRequired) -> pb.SyncResponse:
    match message:
        case m.Bookmark():
            return pb.SyncResponse(bookmark=pb.Bookmark(position=write_position(message.position)))
        case m.ResyncRequired():
            return pb.SyncResponse(resync_required=pb.ResyncRequired(reason=message.reason))


def write_changes(message: m.Snapshot | m.Delta) -> list[bytes]:
    """The encoded changes of a message, of a large snapshot in several parts, to be completed by `write_header`."""
    if isinstance(message, m.Delta):
        delta = pb.Delta(changes=map(_write_entry, message.changes))
        return [pb.SyncResponse(delta=delta).SerializeToString()]
    parts = [message.changes[at : at + CHANGES] for at in range(0, len(message.changes), CHANGES)] or [()]
    return [
        pb.SyncResponse(
            snapshot=pb.Snapshot(changes=map(_write_entry, part), more=number < len(parts))
        ).SerializeToString()
        for number, part in enumerate(parts, 1)
    ]


def write_header(message: m.Snapshot | m.Delta) -> bytes:
    """What each of the encoded parts of a message lacks. In protobuf, messages merge when their bytes are joined, so
    what is the same for all readers is encoded once, and what is one stream's own is added to it.
    """
    position = write_position(message.position)
    if isinstance(message, m.Delta):
        delta = pb.Delta(nonce=message.nonce, base=write_position(message.base), position=position)
        header = pb.SyncResponse(delta=delta)
    else:
        header = pb.SyncResponse(snapshot=pb.Snapshot(nonce=message.nonce, position=position))
    return header.SerializeToString()


def count_changes(message: pb.SyncResponse) -> int:
    return len(message.snapshot.changes) + len(message.delta.changes)


class SnapshotAssembler:
    """Reads the messages of one stream, and reassembles snapshots that come in parts."""

    def __init__(self) -> None:
        self._parts: list[StateEntry] = []

    def read(self, message: pb.SyncResponse) -> m.ToReader | None:
        """The message; None if more parts will follow, or if this version doesn't know its kind."""
        match message.WhichOneof("message"):
            case "snapshot":
                snapshot = message.snapshot
                self._parts += map(_read_entry, snapshot.changes)
                if snapshot.more:
                    return None
                changes, self._parts = tuple(self._parts), []
                return m.Snapshot(snapshot.nonce, read_position(snapshot.position), changes)
            case "delta":
                delta = message.delta
                changes = tuple(map(_read_entry, delta.changes))
                return m.Delta(delta.nonce, read_position(delta.base), read_position(delta.position), changes)
            case "bookmark":
                return m.Bookmark(read_position(message.bookmark.position))
            case "resync_required":
                return m.ResyncRequired(message.resync_required.reason)
            case _:
                return None


def _write_entry(entry: StateEntry) -> pb.Change:
    match entry:
        case TenantState():
            return pb.Change(tenant=pb.TenantChange(tenant=entry.tenant, suspended=entry.suspended))
        case KeyState():
            principal = entry.principal
            return pb.Change(
                key=pb.KeyChange(
                    tenant=principal.tenant,
                    key=principal.key,
                    roles=[ROLE_NUMBERS[role] for role in sorted(principal.roles)],
                    salt=entry.verifier.salt,
                    verifier=entry.verifier.digest,
                    revoked=entry.revoked,
                )
            )
        case ChannelState():
            canary = entry.canary
            return pb.Change(
                channel=pb.ChannelChange(
                    tenant=entry.tenant,
                    channel=entry.channel,
                    stable=write_ref(entry.stable),
                    canary=write_ref(canary.release) if canary else None,
                    canary_permille=canary.permille if canary else 0,
                    canary_salt=canary.salt if canary else "",
                    earlier=map(write_ref, entry.earlier),
                )
            )
        case RecentRelease():
            return pb.Change(release=pb.ReleaseChange(tenant=entry.tenant, release=write_ref(entry.release)))
        case UnknownEntry():
            return pb.Change()


def _read_entry(change: pb.Change) -> StateEntry:
    match change.WhichOneof("kind"):
        case "tenant":
            return TenantState(change.tenant.tenant, change.tenant.suspended)
        case "key":
            key = change.key
            roles = frozenset(ROLES[role] for role in key.roles if role in ROLES)  # others are a newer version's
            principal = Principal(key.tenant, key.key, roles)
            return KeyState(principal, Verifier(key.salt, key.verifier), key.revoked)
        case "channel":
            c = change.channel
            canary = None
            if c.HasField("canary"):
                canary = CanarySplit(read_ref(c.canary), c.canary_permille, c.canary_salt)
            earlier = tuple(map(read_ref, c.earlier))
            return ChannelState(c.tenant, c.channel, read_ref(c.stable), canary, earlier)
        case "release":
            return RecentRelease(change.release.tenant, read_ref(change.release.release))
        case _:
            return UnknownEntry("a newer version's")


# ---- on disk


class ViewEncoder:
    """Views as bytes for the disk: a snapshot message. Entries that were in the last view are encoded already."""

    def __init__(self) -> None:
        self._encoded: dict[tuple[type, object], tuple[StateEntry, bytes]] = {}

    def encode(self, view: StateView) -> bytes:
        encoded: dict[tuple[type, object], tuple[StateEntry, bytes]] = {}
        for entry in view.records():
            key = type(entry), entry.key
            found = self._encoded.get(key)
            if found is None or found[0] is not entry:
                found = entry, pb.Snapshot(changes=[_write_entry(entry)]).SerializeToString()
            encoded[key] = found
        self._encoded = encoded
        header = pb.Snapshot(position=write_position(view.position)).SerializeToString()
        return b"".join((header, *(data for _, data in encoded.values())))


def read_view(data: bytes) -> StateView:
    snapshot = pb.Snapshot.FromString(data)
    return StateView().changed(read_position(snapshot.position), map(_read_entry, snapshot.changes))
