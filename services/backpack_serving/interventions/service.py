"""The rules: who may change what, what a change needs, and what it makes. No SQL, no gRPC, no protobuf."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from backpack_lm import patch
from backpack_lm.patch import Limits, ModelShape

from backpack_serving.errors import (
    AlreadyExists,
    Conflict,
    DataLoss,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    from_patch_error,
)
from backpack_serving.interventions import find
from backpack_serving.interventions.ledger import Ledger, Request, Written, verify_chain
from backpack_serving.interventions.records import (
    Channel,
    Event,
    Key,
    Patch,
    Position,
    Record,
    Release,
    Revision,
    Tenant,
)
from backpack_serving.interventions.store import Read, Store, Write
from backpack_serving.keys import SYSTEM, ApiKey, Principal, Role, Verifier

LIVE = "live"
"""The channel that every tenant has, and that a request gets which names none."""

_ID = re.compile(r"[a-z][a-z0-9-]{0,62}")


class Interventions:
    """The intervention service of one model, on one store. `on_write` is called after each commit."""

    def __init__(
        self,
        store: Store,
        shape: ModelShape,
        limits: Limits = Limits(),
        on_write: Callable[[], None] = lambda: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.shape, self.limits = shape, limits
        self._store, self._now = store, now
        self._ledger = Ledger(store, on_write, now)

    # ---- tenants and keys

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
        _check_id("tenant_id", tenant)

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

    # ---- patches and revisions

    def create_patch(self, who: Principal, name: str, description: str, request: Request) -> Written[Patch]:
        who.require(Role.AUTHOR)
        _check_id("patch_id", name)

        def act(tx: Write, now: datetime) -> tuple[Patch, list[Record]]:
            made = Patch(who.tenant, name, description, now)
            if tx.get(Patch, who.tenant, name):
                raise AlreadyExists("PATCH_EXISTS", f"{made.name} exists already; add a revision to it")
            tx.add(made)
            return made, []

        return self._ledger.write(who, "CreatePatch", request, act)

    def patches(self, who: Principal, after: str | None, limit: int) -> list[tuple[Patch, int]]:
        """Patches with the number of each one's newest revision."""
        who.require(Role.AUTHOR)
        with self._store.read() as tx:
            found = tx.list(Patch, who.tenant, after=after, limit=limit)
            return [(record, find.latest(tx, record)) for record in found]

    def draft_revision(self, who: Principal, name: str, edits: Sequence[patch.Edit]) -> Revision:
        """What `create_revision` would store, after all its checks. Stores nothing."""
        who.require(Role.AUTHOR)
        with self._store.read() as tx:
            return self._revision(tx, who, name, edits, self._now())

    def create_revision(
        self, who: Principal, name: str, edits: Sequence[patch.Edit], request: Request
    ) -> Written[Revision]:
        who.require(Role.AUTHOR)

        def act(tx: Write, now: datetime) -> tuple[Revision, list[Record]]:
            made = self._revision(tx, who, name, edits, now)
            tx.add(made)
            return made, []

        return self._ledger.write(who, "CreateRevision", request, act)

    def revision(self, who: Principal, name: str, number: int) -> Revision:
        who.require(Role.AUTHOR)
        with self._store.read() as tx:
            return find.revision(tx, who.tenant, name, number)

    def revisions(self, who: Principal, name: str, after: int | None, limit: int) -> list[Revision]:
        who.require(Role.AUTHOR)
        with self._store.read() as tx:
            find.patch(tx, who.tenant, name)
            return tx.list(Revision, who.tenant, name, after=after, limit=limit)

    def _revision(
        self, tx: Read, who: Principal, name: str, edits: Sequence[patch.Edit], now: datetime
    ) -> Revision:
        made = patch.Revision(self.shape.fingerprint, tuple(edits))
        try:
            made.validate(self.shape, self.limits)
        except patch.PatchError as error:
            raise from_patch_error(error) from None
        number = find.latest(tx, find.patch(tx, who.tenant, name)) + 1
        blob = made.to_bytes()
        return Revision(who.tenant, name, number, made.digest, made.fingerprint, blob, now)

    # ---- releases and channels

    def create_release(
        self, who: Principal, parts: Sequence[tuple[str, int]], notes: str, request: Request
    ) -> Written[Release]:
        """A release of these (patch, revision number) pairs, in the order in which they apply."""
        who.require(Role.AUTHOR)
        if len(parts) > self.limits.revisions:
            raise InvalidRequest.at(
                "revisions", "TOO_MANY_REVISIONS", f"{len(parts)}, at most {self.limits.revisions}"
            )

        def act(tx: Write, now: datetime) -> tuple[Release, list[Record]]:
            found = [find.revision(tx, who.tenant, name, number) for name, number in parts]
            for record in found:
                self._check_model(record)
            last = tx.list(Release, who.tenant, limit=1, descending=True)
            digest = patch.release_digest([record.digest for record in found])
            listed = json.dumps([list(part) for part in parts])
            made = Release(who.tenant, last[0].number + 1, digest, listed, notes, now)
            tx.add(made)
            return made, []

        return self._ledger.write(who, "CreateRelease", request, act)

    def releases(self, who: Principal, after: int | None, limit: int) -> list[Release]:
        """Newest first."""
        who.require(Role.AUTHOR)
        with self._store.read() as tx:
            return tx.list(Release, who.tenant, after=after, limit=limit, descending=True)

    def channel(self, who: Principal, name: str) -> Channel:
        who.require(Role.AUTHOR)
        with self._store.read() as tx:
            return find.channel(tx, who.tenant, name)

    def channels(self, who: Principal) -> list[Channel]:
        who.require(Role.AUTHOR)
        with self._store.read() as tx:
            return tx.list(Channel, who.tenant)

    def activate(self, who: Principal, name: str, release: int, etag: str, request: Request) -> Written[Channel]:
        """Point a channel at a release. The etag must be the channel's: "" for one that isn't there yet."""
        who.require(Role.RELEASER)
        _check_id("channel", name)

        def act(tx: Write, now: datetime) -> tuple[Channel, list[Record]]:
            wanted = tx.get(Release, who.tenant, release)
            if wanted is None:
                raise NotFound("NO_SUCH_RELEASE", f"tenants/{who.tenant}/releases/{release} doesn't exist")
            for part in wanted.parts:
                self._check_model(find.revision(tx, who.tenant, *part))
            old = tx.get(Channel, who.tenant, name)
            _check_etag(old.etag if old else "", etag)
            return _point(tx, who.tenant, name, wanted, old, now)

        return self._ledger.write(who, "Activate", request, act)

    def rollback(self, who: Principal, name: str, etag: str, request: Request) -> Written[Channel]:
        """Point a channel back at the release it had before."""
        who.require(Role.RELEASER)

        def act(tx: Write, now: datetime) -> tuple[Channel, list[Record]]:
            old = find.channel(tx, who.tenant, name)
            _check_etag(old.etag, etag)
            if old.previous is None:
                raise PreconditionFailed(
                    "NO_PREVIOUS_RELEASE", f"{old.name} has had no release but {old.release}; activate one"
                )
            wanted = tx.get(Release, who.tenant, old.previous)
            assert wanted is not None, "releases are never deleted"
            return _point(tx, who.tenant, name, wanted, old, now)

        return self._ledger.write(who, "Rollback", request, act)

    # ---- audit and sync

    def audit(self, who: Principal, after: int | None, limit: int) -> list[Event]:
        """Newest first: the whole service's entries for an admin, its tenant's for an author."""
        everything = Role.ADMIN in who.roles
        if not everything:
            who.require(Role.AUTHOR)
        found: list[Event] = []
        with self._store.read() as tx:
            while len(found) < limit and (page := tx.list(Event, after=after, limit=limit, descending=True)):
                after = page[-1].revision
                found += [e for e in page if everything or e.tenant == who.tenant]
        return found[:limit]

    def verify_chain(self, who: Principal) -> tuple[int, int | None]:
        """How many entries there are, and the revision of the first that doesn't fit, if one doesn't."""
        if Role.ADMIN not in who.roles:
            who.require(Role.AUTHOR)
        with self._store.read() as tx:
            return verify_chain(tx)

    def snapshot(self) -> tuple[Position, list[Record]]:
        """Everything that gateways know, and where the store stands."""
        with self._store.read() as tx:
            known: list[Record] = [*tx.list(Tenant), *tx.list(Key), *tx.list(Channel)]
            return tx.position, known

    def events_after(self, revision: int, limit: int = 1000) -> tuple[Position, list[Event]]:
        """The writes since a revision, oldest first, and where the store stands."""
        with self._store.read() as tx:
            return tx.position, tx.list(Event, after=revision, limit=limit)

    def fetch_release(self, who: Principal, tenant: str, digest: str) -> list[bytes]:
        """Canonical bytes of a release's revisions, checked against their digests on the way out."""
        who.require(Role.REPLICA)
        with self._store.read() as tx:
            release = tx.find(Release, tenant=tenant, digest=digest)
            if release is None:
                raise NotFound("NO_SUCH_RELEASE", f"tenants/{tenant} has no release {digest}")
            blobs = [find.revision(tx, tenant, *part).blob for part in release.parts]
        try:
            found = patch.release_digest([patch.Revision.from_bytes(blob).digest for blob in blobs])
        except patch.PatchError as error:
            raise DataLoss("CORRUPT", f"{release.name}: {error}") from None
        if found != digest:
            raise DataLoss("WRONG_DIGEST", f"{release.name} is stored as {found}, it was made as {digest}")
        return blobs

    def _check_model(self, record: Revision) -> None:
        if record.fingerprint != self.shape.fingerprint:
            raise PreconditionFailed(
                "WRONG_MODEL",
                f"{record.name} was made for model {record.fingerprint[:12]}…, this is "
                f"{self.shape.fingerprint[:12]}…; create the revision again for this model",
            )


def _key(tenant: str, key: ApiKey, roles: Iterable[Role], now: datetime) -> Key:
    verifier = Verifier.of(key.secret)
    return Key(tenant, key.id, " ".join(sorted(set(roles))), verifier.salt, verifier.digest, now)


def _point(
    tx: Write, tenant: str, name: str, release: Release, old: Channel | None, now: datetime
) -> tuple[Channel, list[Record]]:
    generation, previous = (old.generation + 1, old.release) if old else (1, None)
    made = Channel(tenant, name, release.number, release.digest, previous, generation, now)
    tx.replace(made)
    return made, [made]


def _check_id(field: str, value: str) -> None:
    if not _ID.fullmatch(value):
        raise InvalidRequest.at(field, "BAD_NAME", f"{value!r}; 1 to 63 of a-z, 0-9 and -, starting with a letter")


def _check_etag(current: str, given: str) -> None:
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
