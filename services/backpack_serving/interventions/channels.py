"""The rules of channels, which point a tenant's requests at a release, and of their canaries."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from backpack_serving.auth.keys import SYSTEM, Principal, Role
from backpack_serving.errors import Conflict, InvalidRequest, PreconditionFailed, no_canary
from backpack_serving.interventions import lookup
from backpack_serving.interventions.judgements import JudgementRules
from backpack_serving.interventions.ledger import IdempotencyKey, WriteResult
from backpack_serving.interventions.records import ChannelRecord, Record, ReleaseRecord, RevisionRecord
from backpack_serving.interventions.rules import RuleContext, check_id
from backpack_serving.interventions.store import Write
from backpack_serving.references import Position
from backpack_serving.sync.state import RESIDENT

GUARD = Principal(SYSTEM, "canary-guard", frozenset())
"""The principal that ends a bad canary."""

LONGEST_SALT = 64

Move = Callable[[Write, ChannelRecord], ChannelRecord]
"""Returns the channel as a write changes it."""


class ChannelRules:
    """Each change is one write of one record, and needs the channel's current etag."""

    def __init__(self, context: RuleContext, judgements: JudgementRules) -> None:
        self._context, self._judgements = context, judgements

    def check_model(self, forced: str) -> None:
        """Raises PreconditionFailed if channels are at releases for other models, unless `forced` is how this
        one's fingerprint begins: its replicas refuse those releases, so the tenants would be left with none.
        """
        ours = self._context.shape.fingerprint
        if len(forced) >= len(ours[:12]) and ours.startswith(forced):
            return
        others: set[str] = set()
        names: list[str] = []
        with self._context.store.read() as tx:
            if not tx.values(RevisionRecord, "fingerprint") - {ours}:
                return  # what follows takes a query for each channel
            for channel in tx.list(ChannelRecord):
                served = [channel.release, *([] if channel.canary is None else [channel.canary])]
                parts = [part for number in served for part in lookup.release(tx, channel.tenant, number, True).parts]
                models = {lookup.revision(tx, channel.tenant, *part).fingerprint for part in parts} - {ours}
                others |= models
                names += [channel.name] if models else []
        if names:
            theirs = ", ".join(f"{other[:12]}…" for other in sorted(others))
            raise PreconditionFailed(
                "WRONG_MODEL",
                f"{len(names)} of the channels ({', '.join(names[:3])}{', …' if names[3:] else ''}) are at "
                f"releases for model {theirs}; this is model {ours[:12]}…, whose replicas refuse them. Serve the "
                "model that they are for (BACKPACK_MODEL), use another database (BACKPACK_DATABASE), or start "
                f"with BACKPACK_FORCE_MODEL={ours[:12]}: these channels serve nothing then until their tenants "
                "release patches for this model",
            )

    def get_channel(self, who: Principal, name: str) -> ChannelRecord:
        who.require(Role.AUTHOR, Role.CALLER)
        with self._context.read_as(who) as tx:
            return lookup.channel(tx, who.tenant, name)

    def channel_now(self, who: Principal, name: str) -> tuple[Position, ChannelRecord]:
        """A channel, and the store's position when it was read."""
        who.require(Role.AUTHOR)
        with self._context.read_as(who) as tx:
            return tx.position, lookup.channel(tx, who.tenant, name)

    def list_channels(self, who: Principal, after: str | None, limit: int) -> list[ChannelRecord]:
        who.require(Role.AUTHOR, Role.CALLER)
        with self._context.read_as(who) as tx:
            return tx.list(ChannelRecord, who.tenant, after=after, limit=limit)

    def activate(
        self,
        who: Principal,
        name: str,
        release: int,
        etag: str,
        request: IdempotencyKey,
        allow_degradation: bool = False,
    ) -> WriteResult[ChannelRecord]:
        """Point a channel at a release; a canary ends. The etag must be the channel's: "" for one to be made.

        Raises PreconditionFailed for a release that makes ordinary text much worse, unless that is allowed.
        """
        who.require(Role.RELEASER)
        check_id("channel", name)

        def act(tx: Write, now: datetime) -> tuple[ChannelRecord, list[Record]]:
            wanted = self._release_to_move_to(tx, who.tenant, release)
            old = tx.get(ChannelRecord, who.tenant, name)
            check_etag(old.etag if old else "", etag)
            made = (
                _at_release(old, wanted)
                if old
                else ChannelRecord(who.tenant, name, release, wanted.digest, None, 0, now)
            )
            made = replace(made, judgement=self._judgements.check(tx, wanted, allow_degradation))
            return _store_moved(tx, made, now)

        return self._context.ledger.write(who, "Activate", request, act)

    def rollback(self, who: Principal, name: str, etag: str, request: IdempotencyKey) -> WriteResult[ChannelRecord]:
        """Point a channel back at the release it had before; a canary ends."""

        def move(tx: Write, old: ChannelRecord) -> ChannelRecord:
            if old.previous is None:
                raise PreconditionFailed(
                    "NO_PREVIOUS_RELEASE", f"{old.name} has had no release but {old.release}; activate one"
                )
            wanted = self._release_to_move_to(tx, who.tenant, old.previous)
            return replace(_at_release(old, wanted), judgement=self._judgements.check(tx, wanted, allowed=True))

        return self._move_channel(who, "Rollback", name, etag, request, move)

    def start_canary(
        self,
        who: Principal,
        name: str,
        release: int,
        permille: int,
        salt: str,
        etag: str,
        request: IdempotencyKey,
        allow_degradation: bool = False,
    ) -> WriteResult[ChannelRecord]:
        """Give so many in a thousand request keys another release, or change how many. Raises as `activate` does."""
        if not 1 <= permille <= 999:
            raise InvalidRequest.at("permille", "OUT_OF_RANGE", f"{permille}; 1 to 999 in a thousand")
        if len(salt) > LONGEST_SALT or not salt.isprintable():
            raise InvalidRequest.at("salt", "BAD_SALT", f"{salt!r}; at most {LONGEST_SALT} printable characters")

        def move(tx: Write, old: ChannelRecord) -> ChannelRecord:
            wanted = self._release_to_move_to(tx, who.tenant, release)
            if wanted.digest == old.digest:
                raise PreconditionFailed(
                    "SAME_RELEASE", f"release {release} is what {old.name} is at; choose another one"
                )
            if old.canary is not None and old.canary != release:
                raise PreconditionFailed(
                    "CANARY_RUNNING",
                    f"{old.name} has release {old.canary} as its canary; promote or abort it first",
                )
            drawn = salt or old.salt or secrets.token_hex(8)  # a channel has one as long as it has a canary
            judged = self._judgements.check(tx, wanted, allow_degradation)
            split = replace(old, canary=release, canary_digest=wanted.digest, permille=permille, salt=drawn)
            return replace(split, aborted="", judgement=judged)

        return self._move_channel(who, "StartCanary", name, etag, request, move)

    def promote_canary(
        self, who: Principal, name: str, etag: str, request: IdempotencyKey, allow_degradation: bool = False
    ) -> WriteResult[ChannelRecord]:
        """Make the canary the channel's release. Raises as `activate` does."""

        def move(tx: Write, old: ChannelRecord) -> ChannelRecord:
            wanted = self._release_to_move_to(tx, who.tenant, _canary_of(old))
            judged = self._judgements.check(tx, wanted, allow_degradation)
            return replace(_at_release(old, wanted), judgement=judged)

        return self._move_channel(who, "PromoteCanary", name, etag, request, move)

    def abort_canary(self, who: Principal, name: str, etag: str, request: IdempotencyKey) -> WriteResult[ChannelRecord]:
        """End the canary: all requests get the channel's release."""

        def move(tx: Write, old: ChannelRecord) -> ChannelRecord:
            _canary_of(old)
            return _without_canary(old)

        return self._move_channel(who, "AbortCanary", name, etag, request, move)

    def end_bad_canary(self, tenant: str, name: str, digest: str, why: str) -> WriteResult[ChannelRecord] | None:
        """End a channel's canary on the service's own account. None if this release isn't the canary any more."""
        with self._context.store.read() as tx:
            found = tx.get(ChannelRecord, tenant, name)
        if found is None or found.canary is None or found.canary_digest != digest:
            return None

        def act(tx: Write, now: datetime) -> tuple[ChannelRecord, list[Record]]:
            old = lookup.channel(tx, tenant, name)
            if old.canary_digest != digest:
                raise Conflict("CANARY_OVER", f"{old.name} has another canary, or none")
            return _store_moved(tx, replace(_without_canary(old), aborted=why), now)

        try:
            return self._context.ledger.write(GUARD, "AbortCanary", IdempotencyKey(), act)
        except Conflict:
            return None

    def _move_channel(
        self, who: Principal, method: str, name: str, etag: str, request: IdempotencyKey, move: Move
    ) -> WriteResult[ChannelRecord]:
        who.require(Role.RELEASER)

        def act(tx: Write, now: datetime) -> tuple[ChannelRecord, list[Record]]:
            old = lookup.channel(tx, who.tenant, name)
            check_etag(old.etag, etag)
            return _store_moved(tx, move(tx, old), now)

        return self._context.ledger.write(who, method, request, act)

    def _release_to_move_to(self, tx: Write, tenant: str, number: int) -> ReleaseRecord:
        wanted = lookup.release(tx, tenant, number)
        for part in wanted.parts:
            self._context.check_model(lookup.revision(tx, tenant, *part))
        return wanted


def _at_release(old: ChannelRecord, release: ReleaseRecord) -> ChannelRecord:
    """The channel at another release, without a canary; the release before it stays the rollback's target."""
    before = old.state.stable, *old.state.earlier
    kept = [[ref.number, ref.digest] for ref in before if ref.digest != release.digest][: RESIDENT - 1]
    previous = old.previous if release.number == old.release else old.release
    made = replace(old, release=release.number, digest=release.digest, previous=previous)
    return replace(_without_canary(made), earlier=json.dumps(kept))


def _without_canary(old: ChannelRecord) -> ChannelRecord:
    return replace(old, canary=None, canary_digest="", permille=0, salt="", aborted="", judgement="")


def _store_moved(tx: Write, channel: ChannelRecord, now: datetime) -> tuple[ChannelRecord, list[Record]]:
    made = replace(channel, generation=channel.generation + 1, updated=now, moved=tx.position.revision)
    tx.replace(made)
    for number in (made.release, made.canary):
        if number is not None:
            status = lookup.status(tx, made.tenant, number)
            if not status.served:
                tx.replace(replace(status, served=True))
    return made, [made]


def _canary_of(channel: ChannelRecord) -> int:
    if channel.canary is None:
        why = f"; the last one was ended: {channel.aborted}" if channel.aborted else ""
        raise no_canary(channel.name, why)
    return channel.canary


def check_etag(current: str, given: str) -> None:
    """Raise Conflict unless the caller has read the channel as it is now, InvalidRequest if it gives no etag of it."""
    if current == given:
        return
    if not given:
        raise InvalidRequest.at("etag", "MISSING_ETAG", f"the channel exists; its etag is {current!r}")
    raise Conflict(
        "STALE_ETAG",
        f"etag {given!r}, but the channel is at {current!r} now: someone changed it. Read it again, then decide",
        given=given,
        current=current,
    )
