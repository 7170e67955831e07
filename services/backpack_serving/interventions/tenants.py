"""The rules of tenants and their API keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime

from backpack_lm import patch

from backpack_serving.auth.keys import (
    SYSTEM,
    ApiKeySecret,
    Principal,
    Role,
    Verifier,
    misplaced,
    suspended,
    unknown_key,
)
from backpack_serving.errors import AlreadyExists, InvalidRequest, PreconditionFailed, Unauthenticated
from backpack_serving.interventions import lookup
from backpack_serving.interventions.ledger import IdempotencyKey, WriteResult
from backpack_serving.interventions.records import ChannelRecord, KeyRecord, Record, ReleaseRecord, TenantRecord
from backpack_serving.interventions.rules import RuleContext, check_id
from backpack_serving.interventions.store import Write
from backpack_serving.references import LIVE

TOO_FEW_TO_ASK = 10
"""Tenants that one call may suspend without `force`, however few there are."""


class TenantRules:
    """Tenants and their API keys, for admins."""

    def __init__(self, context: RuleContext) -> None:
        self._context = context

    def authenticate(self, presented: str) -> Principal:
        """The principal of an API key. Raises Unauthenticated if it is unknown or revoked, or its tenant suspended."""
        key = ApiKeySecret.parse(presented)
        with self._context.store.read() as tx:
            record = tx.find(KeyRecord, key=key.id)
            owner = tx.get(TenantRecord, record.tenant) if record else None
        state = record.state if record else None
        if state is None or state.revoked or not state.verifier.accepts(key.secret):
            raise unknown_key()
        if owner is not None and owner.suspended:
            raise suspended(owner.tenant)
        return state.principal

    def check_tenant(self, who: Principal) -> None:
        """Raise Unauthenticated if a credential's tenant doesn't exist or is suspended."""
        with self._context.store.read() as tx:
            tenant = tx.get(TenantRecord, who.tenant)
        if tenant is None:
            raise Unauthenticated("UNKNOWN_TENANT", f"tenants/{who.tenant} doesn't exist", tenant=who.tenant)
        if tenant.suspended:
            raise suspended(who.tenant)

    def bootstrap(self, make: ApiKeySecret, roles: Iterable[Role]) -> None:
        """Give the system tenant a key that was made elsewhere. Only the service itself may, at start.

        Raises PreconditionFailed for a key that is there for something else.
        """
        roles = list(roles)
        with self._context.store.read() as tx:
            found = tx.find(KeyRecord, key=make.id)
        if found:
            if found.tenant != SYSTEM or not set(roles) <= set(found.roles.split()):
                raise PreconditionFailed(
                    "KEY_TAKEN",
                    f"the key that shall be {' and '.join(roles)} is {found.name} ({found.roles}) already; give "
                    "another one",
                )
            return

        def act(tx: Write, now: datetime) -> tuple[KeyRecord, list[Record]]:
            if tx.get(KeyRecord, SYSTEM, make.id):
                raise AlreadyExists("KEY_EXISTS", "another process that started at the same time has added the key")
            made: list[Record] = []
            if tx.get(TenantRecord, SYSTEM) is None:
                made.append(TenantRecord(SYSTEM, now))
            key = _new_key_record(SYSTEM, make, roles, now)
            made.append(key)
            for record in made:
                tx.add(record)
            return key, made

        with suppress(AlreadyExists):
            self._context.ledger.write(Principal(SYSTEM, "bootstrap", frozenset()), "Bootstrap", IdempotencyKey(), act)

    def create_tenant(self, who: Principal, tenant: str, request: IdempotencyKey) -> WriteResult[TenantRecord]:
        """Create a tenant, with a channel `live` at release 0: the model unpatched.

        Raises AlreadyExists, or InvalidRequest for a name that none may have.
        """
        who.require(Role.ADMIN)
        check_id("tenant_id", tenant)

        def act(tx: Write, now: datetime) -> tuple[TenantRecord, list[Record]]:
            if tx.get(TenantRecord, tenant):
                raise AlreadyExists("TENANT_EXISTS", f"tenants/{tenant} exists already", tenant=tenant)
            made = TenantRecord(tenant, now)
            empty = ReleaseRecord(tenant, 0, patch.release_digest([]), "[]", "the model unpatched", now)
            live = ChannelRecord(tenant, LIVE, 0, empty.digest, None, 1, now, moved=tx.position.revision)
            for record in (made, empty, live):
                tx.add(record)
            return made, [made, live]

        return self._context.ledger.write(who, "CreateTenant", request, act)

    def list_tenants(self, who: Principal, after: str | None, limit: int) -> list[TenantRecord]:
        who.require(Role.ADMIN)
        with self._context.store.read() as tx:
            return tx.list(TenantRecord, after=after, limit=limit)

    def create_key(
        self, who: Principal, tenant: str, roles: Sequence[Role], request: IdempotencyKey
    ) -> tuple[WriteResult[KeyRecord], ApiKeySecret | None]:
        """Create a key; returns its secret too, unless the request is a repetition."""
        who.require(Role.ADMIN)
        if not roles:
            raise InvalidRequest.at("roles", "EMPTY", "a key without roles may do nothing; give at least one")
        if wrong := misplaced(roles, tenant):
            raise InvalidRequest.at(
                "roles", "WRONG_TENANT", f"{wrong}: admin and replica are roles of tenants/{SYSTEM} alone"
            )
        minted = ApiKeySecret.mint()

        def act(tx: Write, now: datetime) -> tuple[KeyRecord, list[Record]]:
            lookup.tenant(tx, tenant)
            made = _new_key_record(tenant, minted, roles, now)
            tx.add(made)
            return made, [made]

        written = self._context.ledger.write(who, "CreateApiKey", request, act)
        return written, None if written.repeated else minted

    def rotate_key(
        self, who: Principal, tenant: str, key: str, request: IdempotencyKey
    ) -> tuple[WriteResult[KeyRecord], ApiKeySecret | None]:
        """Replace a key, which is revoked; returns the new secret too, unless the request is a repetition."""
        who.require(Role.ADMIN)
        minted = ApiKeySecret.mint()

        def act(tx: Write, now: datetime) -> tuple[KeyRecord, list[Record]]:
            old = lookup.key(tx, tenant, key)
            if old.revoked:
                raise PreconditionFailed("KEY_REVOKED", f"{old.name} is revoked; create a key instead")
            made = _new_key_record(tenant, minted, map(Role, old.roles.split()), now)
            revoked = replace(old, revoked=True)
            tx.add(made)
            tx.replace(revoked)
            return made, [made, revoked]

        written = self._context.ledger.write(who, "RotateApiKey", request, act)
        return written, None if written.repeated else minted

    def list_keys(self, who: Principal, tenant: str, after: str | None, limit: int) -> list[KeyRecord]:
        who.require(Role.ADMIN)
        with self._context.store.read() as tx:
            lookup.tenant(tx, tenant)
            return tx.list(KeyRecord, tenant, after=after, limit=limit)

    def revoke_key(self, who: Principal, tenant: str, key: str, request: IdempotencyKey) -> WriteResult[KeyRecord]:
        """Revoke a key for ever. Raises NotFound if there is no such key."""
        who.require(Role.ADMIN)

        def act(tx: Write, now: datetime) -> tuple[KeyRecord, list[Record]]:
            revoked = replace(lookup.key(tx, tenant, key), revoked=True)
            tx.replace(revoked)
            return revoked, [revoked]

        return self._context.ledger.write(who, "RevokeApiKey", request, act)

    def suspend(
        self, who: Principal, names: Sequence[str], force: bool, request: IdempotencyKey
    ) -> WriteResult[TenantRecord]:
        """Refuse all keys of these tenants, from now on.

        Raises PreconditionFailed for more than the larger of TOO_FEW_TO_ASK and a tenth of the active tenants at
        once, unless it is forced: that is more often a mistake than a wish.
        """
        who.require(Role.ADMIN)
        if SYSTEM in names:
            raise InvalidRequest.at("names", "OPERATORS", f"tenants/{SYSTEM} operates the service; revoke a key")

        def act(tx: Write, now: datetime) -> tuple[TenantRecord, list[Record]]:
            ends = [found for found in _find_tenants(tx, names) if not found.suspended]
            active = sum(not each.suspended and each.tenant != SYSTEM for each in tx.list(TenantRecord))
            bound = max(TOO_FEW_TO_ASK, active // 10)
            if len(ends) > bound and not force:
                raise PreconditionFailed(
                    "NEEDS_FORCE",
                    f"this would end the service of {len(ends)} of {active} active tenants; more than {bound} at "
                    "once need `force`",
                    tenants=len(ends),
                    active=active,
                    bound=bound,
                )
            return _replaced(tx, [replace(each, suspended=True) for each in ends])

        return self._context.ledger.write(who, "SuspendTenants", request, act)

    def resume(self, who: Principal, names: Sequence[str], request: IdempotencyKey) -> WriteResult[TenantRecord]:
        """Accept the keys of these tenants again."""
        who.require(Role.ADMIN)

        def act(tx: Write, now: datetime) -> tuple[TenantRecord, list[Record]]:
            return _replaced(tx, [replace(t, suspended=False) for t in _find_tenants(tx, names) if t.suspended])

        return self._context.ledger.write(who, "ResumeTenants", request, act)


def _find_tenants(tx: Write, names: Sequence[str]) -> list[TenantRecord]:
    if not names:
        raise InvalidRequest.at("names", "EMPTY", "name at least one tenant")
    return [lookup.tenant(tx, name) for name in dict.fromkeys(names)]


def _replaced(tx: Write, tenants: list[TenantRecord]) -> tuple[TenantRecord, list[Record]]:
    """Replace several tenants in one write, whose audit entry is about the system tenant."""
    for tenant in tenants:
        tx.replace(tenant)
    return lookup.tenant(tx, SYSTEM), [*tenants]


def _new_key_record(tenant: str, key: ApiKeySecret, roles: Iterable[Role], now: datetime) -> KeyRecord:
    verifier = Verifier.of(key.secret)
    return KeyRecord(tenant, key.id, " ".join(sorted(set(roles))), verifier.salt, verifier.digest, now)
