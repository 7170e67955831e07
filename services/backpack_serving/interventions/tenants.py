"""The rules of tenants and their API keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime

from backpack_lm import patch

from backpack_serving.errors import AlreadyExists, InvalidRequest, PreconditionFailed, Unauthenticated
from backpack_serving.interventions import find
from backpack_serving.interventions.ledger import Request, Written
from backpack_serving.interventions.records import Channel, Key, Record, Release, Tenant
from backpack_serving.interventions.rules import Rules, check_id
from backpack_serving.interventions.store import Write
from backpack_serving.keys import (
    SYSTEM,
    ApiKey,
    Principal,
    Role,
    Verifier,
    misplaced,
    suspended,
    unknown_key,
)
from backpack_serving.sync.known import LIVE

TOO_FEW_TO_ASK = 10
"""So many tenants may be suspended at once without force, however few there are."""


class TenantRules(Rules):
    """Who there is, and which keys open what. For admins."""

    def authenticate(self, presented: str) -> Principal:
        """Who presents this key. Raises Unauthenticated if nobody may, or may any more."""
        key = ApiKey.parse(presented)
        with self._store.read() as tx:
            record = tx.find(Key, key=key.id)
            owner = tx.get(Tenant, record.tenant) if record else None
        if record is None or record.revoked or not Verifier(record.salt, record.verifier).accepts(key.secret):
            raise unknown_key()
        if owner is not None and owner.suspended:
            raise suspended(owner.tenant)
        return Principal(record.tenant, record.key, frozenset(map(Role, record.roles.split())))

    def check_tenant(self, who: Principal) -> None:
        """Raises Unauthenticated if a credential names a tenant that isn't there, or is suspended."""
        with self._store.read() as tx:
            tenant = tx.get(Tenant, who.tenant)
        if tenant is None:
            raise Unauthenticated("UNKNOWN_TENANT", f"tenants/{who.tenant} doesn't exist", tenant=who.tenant)
        if tenant.suspended:
            raise suspended(who.tenant)

    def bootstrap(self, make: ApiKey, roles: Iterable[Role]) -> None:
        """Give the system tenant a key that was made outside. Only for whoever holds the database itself.

        Raises PreconditionFailed for a key that is there for something else.
        """
        roles = list(roles)
        with self._store.read() as tx:
            found = tx.find(Key, key=make.id)
        if found:
            if found.tenant != SYSTEM or not set(roles) <= set(found.roles.split()):
                raise PreconditionFailed(
                    "KEY_TAKEN",
                    f"the key that shall be {' and '.join(roles)} is {found.name} ({found.roles}) already; give "
                    "another one",
                )
            return

        def act(tx: Write, now: datetime) -> tuple[Key, list[Record]]:
            if tx.get(Key, SYSTEM, make.id):
                raise AlreadyExists(
                    "KEY_EXISTS", "another process that started at the same time has added the key"
                )
            made: list[Record] = []
            if tx.get(Tenant, SYSTEM) is None:
                made.append(Tenant(SYSTEM, now))
            key = _key(SYSTEM, make, roles, now)
            made.append(key)
            for record in made:
                tx.add(record)
            return key, made

        with suppress(AlreadyExists):
            self._ledger.write(Principal(SYSTEM, "bootstrap", frozenset()), "Bootstrap", Request(), act)

    def create_tenant(self, who: Principal, tenant: str, request: Request) -> Written[Tenant]:
        """A tenant, whose channel `live` is at its release 0: the model unpatched.

        Raises AlreadyExists, or InvalidRequest for a name that none may have.
        """
        who.require(Role.ADMIN)
        check_id("tenant_id", tenant)

        def act(tx: Write, now: datetime) -> tuple[Tenant, list[Record]]:
            if tx.get(Tenant, tenant):
                raise AlreadyExists("TENANT_EXISTS", f"tenants/{tenant} exists already", tenant=tenant)
            made = Tenant(tenant, now)
            empty = Release(tenant, 0, patch.release_digest([]), "[]", "the model unpatched", now)
            live = Channel(tenant, LIVE, 0, empty.digest, None, 1, now, moved=tx.position.revision)
            for record in (made, empty, live):
                tx.add(record)
            return made, [made, live]

        return self._ledger.write(who, "CreateTenant", request, act)

    def tenants(self, who: Principal, after: str | None, limit: int) -> list[Tenant]:
        who.require(Role.ADMIN)
        with self._store.read() as tx:
            return tx.list(Tenant, after=after, limit=limit)

    def create_key(
        self, who: Principal, tenant: str, roles: Sequence[Role], request: Request
    ) -> tuple[Written[Key], ApiKey | None]:
        """A new key, and its secret unless the request is a repetition."""
        who.require(Role.ADMIN)
        if not roles:
            raise InvalidRequest.at("roles", "EMPTY", "a key without roles may do nothing; give at least one")
        if wrong := misplaced(roles, tenant):
            raise InvalidRequest.at(
                "roles", "WRONG_TENANT", f"{wrong}: admin and replica are roles of tenants/{SYSTEM} alone"
            )
        minted = ApiKey.mint()

        def act(tx: Write, now: datetime) -> tuple[Key, list[Record]]:
            find.tenant(tx, tenant)
            made = _key(tenant, minted, roles, now)
            tx.add(made)
            return made, [made]

        written = self._ledger.write(who, "CreateApiKey", request, act)
        return written, None if written.repeated else minted

    def rotate_key(
        self, who: Principal, tenant: str, key: str, request: Request
    ) -> tuple[Written[Key], ApiKey | None]:
        """A new key in the place of another, which is revoked; its secret unless the request is a repetition."""
        who.require(Role.ADMIN)
        minted = ApiKey.mint()

        def act(tx: Write, now: datetime) -> tuple[Key, list[Record]]:
            old = find.key(tx, tenant, key)
            if old.revoked:
                raise PreconditionFailed("KEY_REVOKED", f"{old.name} is revoked; create a key instead")
            made = _key(tenant, minted, map(Role, old.roles.split()), now)
            revoked = replace(old, revoked=True)
            tx.add(made)
            tx.replace(revoked)
            return made, [made, revoked]

        written = self._ledger.write(who, "RotateApiKey", request, act)
        return written, None if written.repeated else minted

    def keys(self, who: Principal, tenant: str, after: str | None, limit: int) -> list[Key]:
        who.require(Role.ADMIN)
        with self._store.read() as tx:
            find.tenant(tx, tenant)
            return tx.list(Key, tenant, after=after, limit=limit)

    def revoke_key(self, who: Principal, tenant: str, key: str, request: Request) -> Written[Key]:
        """End a key for ever. Raises NotFound if there is none such."""
        who.require(Role.ADMIN)

        def act(tx: Write, now: datetime) -> tuple[Key, list[Record]]:
            revoked = replace(find.key(tx, tenant, key), revoked=True)
            tx.replace(revoked)
            return revoked, [revoked]

        return self._ledger.write(who, "RevokeApiKey", request, act)

    def suspend(self, who: Principal, names: Sequence[str], force: bool, request: Request) -> Written[Tenant]:
        """Refuse all keys of these tenants, from now on.

        Raises PreconditionFailed for more than the larger of TOO_FEW_TO_ASK and a tenth of the active tenants at
        once, unless it is forced: that is more often a mistake than a wish.
        """
        who.require(Role.ADMIN)
        if SYSTEM in names:
            raise InvalidRequest.at("names", "OPERATORS", f"tenants/{SYSTEM} operates the service; revoke a key")

        def act(tx: Write, now: datetime) -> tuple[Tenant, list[Record]]:
            ends = [found for found in _named(tx, names) if not found.suspended]
            active = sum(not each.suspended and each.tenant != SYSTEM for each in tx.list(Tenant))
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

        return self._ledger.write(who, "SuspendTenants", request, act)

    def resume(self, who: Principal, names: Sequence[str], request: Request) -> Written[Tenant]:
        """Let the keys of these tenants be good again."""
        who.require(Role.ADMIN)

        def act(tx: Write, now: datetime) -> tuple[Tenant, list[Record]]:
            return _replaced(tx, [replace(t, suspended=False) for t in _named(tx, names) if t.suspended])

        return self._ledger.write(who, "ResumeTenants", request, act)


def _named(tx: Write, names: Sequence[str]) -> list[Tenant]:
    if not names:
        raise InvalidRequest.at("names", "EMPTY", "name at least one tenant")
    return [find.tenant(tx, name) for name in dict.fromkeys(names)]


def _replaced(tx: Write, tenants: list[Tenant]) -> tuple[Tenant, list[Record]]:
    """Many records changed by one write, which is told as one about the operators."""
    for tenant in tenants:
        tx.replace(tenant)
    return find.tenant(tx, SYSTEM), [*tenants]


def _key(tenant: str, key: ApiKey, roles: Iterable[Role], now: datetime) -> Key:
    verifier = Verifier.of(key.secret)
    return Key(tenant, key.id, " ".join(sorted(set(roles))), verifier.salt, verifier.digest, now)
