"""The rules of tenants and their API keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime

from backpack_lm import patch

from backpack_serving.errors import AlreadyExists, InvalidRequest, NotFound
from backpack_serving.interventions import find
from backpack_serving.interventions.ledger import Request, Written
from backpack_serving.interventions.records import Channel, Key, Record, Release, Tenant
from backpack_serving.interventions.rules import LIVE, Rules, check_id
from backpack_serving.interventions.store import Write
from backpack_serving.keys import SYSTEM, ApiKey, Principal, Role, Verifier


class TenantRules(Rules):
    """Who there is, and which keys open what. For admins."""

    def authenticate(self, presented: str) -> Principal | None:
        """Who presents this key; None if nobody does, or does any more. Raises Unauthenticated if malformed."""
        key = ApiKey.parse(presented)
        with self._store.read() as tx:
            record = tx.find(Key, key=key.id)
        if record is None or record.revoked:
            return None
        if not Verifier(record.salt, record.verifier).accepts(key.secret):
            return None
        return Principal(record.tenant, record.key, frozenset(map(Role, record.roles.split())))

    def bootstrap(self, make: ApiKey, roles: Iterable[Role]) -> None:
        """Give the system tenant a key that was made outside. Only for whoever holds the database itself."""
        with self._store.read() as tx:
            if tx.get(Key, SYSTEM, make.id):
                return

        def act(tx: Write, now: datetime) -> tuple[Key, list[Record]]:
            made: list[Record] = []
            if tx.get(Tenant, SYSTEM) is None:
                made.append(Tenant(SYSTEM, now))
            key = _key(SYSTEM, make, roles, now)
            made.append(key)
            for record in made:
                tx.add(record)
            return key, made

        self._ledger.write(Principal(SYSTEM, "bootstrap", frozenset()), "Bootstrap", Request(), act)

    def create_tenant(self, who: Principal, tenant: str, request: Request) -> Written[Tenant]:
        who.require(Role.ADMIN)
        check_id("tenant_id", tenant)

        def act(tx: Write, now: datetime) -> tuple[Tenant, list[Record]]:
            if tx.get(Tenant, tenant):
                raise AlreadyExists("TENANT_EXISTS", f"tenants/{tenant} exists already", tenant=tenant)
            made = Tenant(tenant, now)
            empty = Release(tenant, 0, patch.release_digest([]), "[]", "the model unpatched", now)
            live = Channel(tenant, LIVE, 0, empty.digest, None, 1, now)
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
        operators = {Role.ADMIN, Role.REPLICA}
        if wrong := [r for r in roles if (r in operators) != (tenant == SYSTEM)]:
            raise InvalidRequest.at(
                "roles", "WRONG_TENANT", f"{wrong[0]}: admin and replica are roles of tenants/{SYSTEM} alone"
            )
        minted = ApiKey.mint()

        def act(tx: Write, now: datetime) -> tuple[Key, list[Record]]:
            find.tenant(tx, tenant)
            made = _key(tenant, minted, roles, now)
            tx.add(made)
            return made, [made]

        written = self._ledger.write(who, "CreateApiKey", request, act)
        return written, None if written.repeated else minted

    def keys(self, who: Principal, tenant: str) -> list[Key]:
        who.require(Role.ADMIN)
        with self._store.read() as tx:
            find.tenant(tx, tenant)
            return tx.list(Key, tenant)

    def revoke_key(self, who: Principal, tenant: str, key: str, request: Request) -> Written[Key]:
        who.require(Role.ADMIN)

        def act(tx: Write, now: datetime) -> tuple[Key, list[Record]]:
            record = tx.get(Key, tenant, key)
            if record is None:
                raise NotFound("NO_SUCH_KEY", f"tenants/{tenant}/keys/{key} doesn't exist")
            revoked = replace(record, revoked=True)
            tx.replace(revoked)
            return revoked, [revoked]

        return self._ledger.write(who, "RevokeApiKey", request, act)


def _key(tenant: str, key: ApiKey, roles: Iterable[Role], now: datetime) -> Key:
    verifier = Verifier.of(key.secret)
    return Key(tenant, key.id, " ".join(sorted(set(roles))), verifier.salt, verifier.digest, now)
