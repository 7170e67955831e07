"""Releases by digest: fetched, verified, compiled once; those of channels are kept, others for a while."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import structlog
from backpack_lm.overlay import Overlay
from backpack_lm.patch import (
    PatchError,
    PatchLimits,
    ReleaseContent,
    RevisionContent,
    TopicEdit,
    Violation,
    served_digest,
)

from backpack_serving import tasks
from backpack_serving.errors import (
    INTERNAL_CALL_ERRORS,
    RELEASE_UNREACHABLE,
    Internal,
    ServiceError,
    Unavailable,
    from_patch_error,
)
from backpack_serving.inference.denominators import Denominators
from backpack_serving.inference.fair_lock import FairLock
from backpack_serving.inference.release_files import ReleaseFiles, check_digest
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.references import CanaryTally, Refusal, ReleaseRef
from backpack_serving.sync.state import ChannelState, Stageable, StateView

log = structlog.get_logger(__name__)

Fetch = Callable[[str, str], Awaitable[list[bytes]]]
"""(tenant, digest) → the canonical bytes of the release's revisions."""

AT_ONCE = 4
"""Releases that are fetched and compiled side by side."""

STAGING_PATIENCE = 2.0
"""Seconds that a channel's change waits for the denominators of topic scores if it is the first to need them. Then it
is refused for now and tried again: the changes of other channels don't wait for minutes."""

MOST_REFUSED = 1024

MOST_STAGING = 512
"""Changes that are staged side by side. With twenty thousand, Python's collector alone held the loop for 0.1 s."""

CHANGES_A_TURN = 64
"""Changes that are staged, and channels that are looked through, in one turn of the loop: each takes some 30 µs."""


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A release, and the tenant that it was compiled for."""

    overlay: Overlay
    tenant: str


@dataclass(frozen=True, slots=True)
class WantedRelease:
    """The release that is stored with this digest, and a draft's edits after its own; `digest` is of both."""

    stored: str
    draft: RevisionContent | None = None
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", served_digest(self.stored, self.draft.digest if self.draft else ""))


class ReleaseCache:
    """The compiled releases of a replica, and the owner of its reader.

    A digest names its content, so nothing here is ever stale. What a channel is at, its canary, and what it was at
    before stay as long as they fit `tenant_bytes`; of the others, the `capacity` used last, as far as those of one
    tenant fit as many. What a request uses is never dropped under it.
    """

    def __init__(
        self,
        served: ServedModel,
        fetch: Fetch,
        blobs: ReleaseFiles,
        capacity: int,
        tenant_bytes: int,
        limits: PatchLimits = PatchLimits(),
    ) -> None:
        self._served, self._fetch, self._blobs = served, fetch, blobs
        self._capacity, self._tenant_bytes, self._limits = capacity, tenant_bytes, limits
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()  # least recently used first
        self._loading: dict[str, asyncio.Task[Overlay]] = {}
        self._refused: OrderedDict[str, tuple[Violation, ...]] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._kept: frozenset[str] = frozenset()
        self._staged: dict[str, dict[tuple[str, str], Stageable]] = {}  # by tenant; for a view that isn't in effect
        self._view = StateView()
        self._channels: dict[str, dict[tuple[str, str], ChannelState]] = {}  # the view's, by tenant
        self._kept_of: dict[str, frozenset[str]] = {}  # what is kept of each tenant; `_kept` is of all
        self._most_served: dict[str, dict[str, int]] = {}  # see `_within_bytes`
        self._settling: Iterator[None] | None = None
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._draft_turns = FairLock()
        self._denominators = Denominators(served.table)
        self._measuring: dict[str, asyncio.Event] = {}  # of releases that load; set once one waits for those
        self.fetched = 0

    @property
    def count(self) -> int:
        return len(self._compiled)

    @asynccontextmanager
    async def use(
        self, tenant: str, release: str, patience: float | None = None, draft: RevisionContent | None = None
    ) -> AsyncIterator[Overlay]:
        """The compiled release with this digest, for as long as the block runs; with a draft, the release that has the
        draft's edits, too, which is kept in memory like any other, and never on disk.

        If the denominators of its topics aren't there after `patience` seconds, raises Unavailable, to be retried.
        Raises ServiceError or PatchError if it can't be had or doesn't fit the model: never another release.
        """
        wanted = WantedRelease(release, draft)
        digest = wanted.digest
        self._users[digest] += 1
        try:
            yield await self._get_overlay(tenant, wanted, patience)
        finally:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]
                if draft and (making := self._loading.pop(digest, None)):
                    making.cancel()  # nobody waits for it, and nobody else will
                self._evict()

    async def _get_overlay(self, tenant: str, wanted: WantedRelease, patience: float | None = None) -> Overlay:
        """Requests for a release that is still being made share the work."""
        digest = wanted.digest
        if found := self._compiled.get(digest):
            self._compiled.move_to_end(digest)
            return found.overlay
        if refused := self._refused.get(digest):
            raise PatchError(*refused)  # a new one: those that are raised gather where they came by, and keep it
        if digest not in self._loading:
            self._measuring[digest] = asyncio.Event()
            task = self._loading[digest] = asyncio.create_task(self._load_release(tenant, wanted))
            task.add_done_callback(partial(self._loaded, digest))
        making = self._loading[digest]
        if patience is not None:
            await self._measured(digest, making, patience)
        # One caller going away must not cancel the work that others wait for.
        return await asyncio.shield(making)

    async def _measured(self, digest: str, making: asyncio.Task[Overlay], patience: float) -> None:
        """Wait until a release is made. Raises Unavailable if it waits for denominators after so many seconds."""
        loop = asyncio.get_running_loop()
        until = loop.time() + patience
        waits = asyncio.create_task(self._measuring[digest].wait())
        try:
            await asyncio.wait([making, waits], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waits.cancel()
        await asyncio.wait([making], timeout=max(0.0, until - loop.time()))
        if not making.done() and not self._denominators.ready:
            raise self._denominators.refusal()

    def _loaded(self, digest: str, task: asyncio.Task[Overlay]) -> None:
        if self._loading.get(digest) is task:
            del self._loading[digest]
        if digest not in self._loading:
            self._measuring.pop(digest, None)
        if not task.cancelled():
            task.exception()  # or asyncio logs it, when all who asked have left

    async def _load_release(self, tenant: str, wanted: WantedRelease) -> Overlay:
        try:
            overlay = await self._read_or_fetch(tenant, wanted)
        except (ServiceError, PatchError):
            raise
        except Exception:  # one release must not keep those beside it from being made ready
            log.exception("a release can't be made ready", tenant=tenant, digest=wanted.digest)
            raise Internal("INTERNAL", "an internal error; the replica's log has more") from None
        self._compiled[wanted.digest] = _Compiled(overlay, tenant)
        self._evict()
        return overlay

    async def _read_or_fetch(self, tenant: str, wanted: WantedRelease) -> Overlay:
        """From disk, or else fetched, and then on disk."""
        stored = wanted.stored
        try:
            async with self._slots:
                revisions = await asyncio.to_thread(self._blobs.read, stored)
                on_disk = revisions is not None
                if revisions is None:
                    self.fetched += 1
                    revisions = await self._fetched(tenant, stored)
                    await asyncio.to_thread(check_digest, revisions, stored)  # a file's digest is checked by its read
                release = await asyncio.to_thread(self._parse_release, revisions, wanted.draft)
            if any(isinstance(edit, TopicEdit) for edit in release.edits) and not self._denominators.ready:
                self._measuring[wanted.digest].set()
                await self._denominators.wait()  # without a slot: releases without topics are made meanwhile
            async with self._turn(tenant, wanted):
                # The turn ends with the thread, also if nobody waits any more: a thread can't be stopped.
                overlay = await tasks.finish(asyncio.to_thread(self._compile_release, release))
        except PatchError as error:
            self._refused[wanted.digest] = error.violations
            while len(self._refused) > MOST_REFUSED:
                self._refused.popitem(last=False)
            raise
        if not on_disk:
            try:
                await asyncio.to_thread(self._blobs.write, stored, revisions)
            except OSError as error:  # a full disk must not stop what is in memory
                log.error("a release can't be kept on disk", digest=stored, error=str(error))
        return overlay

    def _turn(self, tenant: str, wanted: WantedRelease) -> AbstractAsyncContextManager[object]:
        """Drafts are compiled one at a time, tenants in turn: releases don't wait for them."""
        return self._draft_turns.acquire(tenant) if wanted.draft else self._slots

    async def _fetched(self, tenant: str, digest: str) -> list[bytes]:
        try:
            return await self._fetch(tenant, digest)
        except INTERNAL_CALL_ERRORS as error:  # nor must a gateway take it for ours: we are here
            message = f"this replica can't fetch release {digest} now"
            log.warning("a release can't be fetched", tenant=tenant, digest=digest, error=error.message)
            raise Unavailable(RELEASE_UNREACHABLE, message, retry_after=1.0) from None

    def _parse_release(self, revisions: list[bytes], draft: RevisionContent | None) -> ReleaseContent:
        """Parse the canonical bytes, add the draft, and validate again."""
        release = ReleaseContent(tuple(map(RevisionContent.from_bytes, revisions)), draft)
        release.validate(self._served.shape, self._limits)
        return release

    def _compile_release(self, release: ReleaseContent) -> Overlay:
        """Compile, and try out."""
        overlay = Overlay.compile(release, self._served.table, self._served.shape.name)
        self._served.try_out(overlay)
        return overlay

    def is_needed(self, digest: str) -> bool:
        return digest in self._kept or digest in self._users

    @property
    def needed(self) -> frozenset[str]:
        """What channels need, and what requests and staged changes use."""
        return self._kept.union(self._users)

    def _evict(self) -> None:
        """Of what isn't needed, drop what was used least recently: beyond the capacity, or its tenant's bytes."""
        sizes = Counter[str]()
        idle = [digest for digest in reversed(self._compiled) if not self.is_needed(digest)]
        for place, digest in enumerate(idle):
            held = self._compiled[digest]
            sizes[held.tenant] += held.overlay.nbytes
            if place >= self._capacity or sizes[held.tenant] > self._tenant_bytes:
                sizes[held.tenant] -= held.overlay.nbytes
                del self._compiled[digest]

    # ---- backpack_serving.sync.transport.Owner

    async def stage(self, work: tuple[Stageable, ...]) -> tuple[Refusal, ...]:
        """Get the releases that these channels are at ready; those that they were at before if that can be.

        If the denominators of topic scores are being computed already, what needs them is refused at once, for now.
        Releases that channels were at before never wait for them; they are compiled when the denominators are there.
        """
        staging: deque[asyncio.Task[Refusal | None]] = deque()
        refused: list[Refusal | None] = []
        try:
            for at in range(0, len(work), CHANGES_A_TURN):
                staging += [asyncio.create_task(self._stage(change)) for change in work[at : at + CHANGES_A_TURN]]
                await asyncio.sleep(0)
                while staging and (staging[0].done() or len(staging) > MOST_STAGING):
                    refused.append(await staging[0])
                    staging.popleft()
            while staging:
                refused.append(await staging[0])
                staging.popleft()
            return tuple(refusal for refusal in refused if refusal)
        finally:
            for task in staging:
                task.cancel()

    async def _stage(self, change: Stageable) -> Refusal | None:
        staged = self._staged.setdefault(change.tenant, {})
        if before := staged.get(change.key):
            self._unstage(before)
        self._staged.setdefault(change.tenant, staged)[change.key] = change
        self._users.update(_digests(change))
        refusal = await self._get_ready(change)
        if refusal and self._is_staged(change):
            self._unstage(change)
            self._evict()
        elif not refusal:
            for release in _earlier(change):
                with suppress(ServiceError, PatchError):
                    await self._get_overlay(change.tenant, WantedRelease(release.digest), patience=0.0)
        return refusal

    def _is_staged(self, change: Stageable) -> bool:
        return self._staged.get(change.tenant, {}).get(change.key) is change

    def _unstage(self, change: Stageable) -> None:
        """It holds now, or never will."""
        staged = self._staged[change.tenant]
        del staged[change.key]
        if not staged:
            del self._staged[change.tenant]
        self._most_served.pop(change.tenant, None)
        for digest in _digests(change):
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]

    async def _get_ready(self, change: Stageable) -> Refusal | None:
        """What a change serves, if it fits beside what else its tenant's channels are at or are about to be."""
        patience = 0.0 if self._denominators.computing else STAGING_PATIENCE
        for release in change.serving:
            try:
                await self._get_overlay(change.tenant, WantedRelease(release.digest), patience)
            except (ServiceError, PatchError) as error:
                return _refusal(change, release, error)
        if not self._within_bytes(change):
            size = sum(self._overlay_sizes(self._serving(change.tenant)))
            message = f"{size} bytes of releases for tenants/{change.tenant}, at most {self._tenant_bytes}"
            return Refusal(*change.key, change.serving[0].digest, "TENANT_TOO_LARGE", message)
        return None

    def _within_bytes(self, change: Stageable) -> bool:
        """Whether what the tenant's channels serve, once what is staged holds, is within its bytes.

        They are looked through when the sum of all that was staged since is too large: it counts what is replaced, too,
        and looking through twenty thousand channels for each of them would take minutes.
        """
        most = self._most_served.get(change.tenant)
        if most is not None and isinstance(change, ChannelState):
            digests = [release.digest for release in change.serving]
            most.update(zip(digests, self._overlay_sizes(digests), strict=True))
        if most is None or sum(most.values()) > self._tenant_bytes:
            serving = self._serving(change.tenant)
            most = self._most_served[change.tenant] = dict(zip(serving, self._overlay_sizes(serving), strict=True))
        return sum(most.values()) <= self._tenant_bytes

    def swapped(self, view: StateView) -> None:
        """Keep what this view's channels need.

        Of many changes the first are looked through at once, the others in the next turns of the loop; until then what
        was kept and what is staged stays.
        """
        if view.channels is self._view.channels and view.fresh is self._view.fresh:
            return
        self._settling = settling = self._settle(view)  # instead of one that isn't through
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # at the start, in a thread
            deque(settling, 0)
            self._settling = None
        else:
            self._go_on(settling)

    @property
    def settling(self) -> bool:
        """Whether a view is still looked through."""
        return self._settling is not None

    def _go_on(self, settling: Iterator[None]) -> None:
        if self._settling is not settling:
            return  # a newer view came
        if next(settling, True) is None:
            asyncio.get_running_loop().call_soon(self._go_on, settling)
        else:
            self._settling = None

    def _settle(self, view: StateView) -> Iterator[None]:
        """Find out what a view needs. Yields after each CHANGES_A_TURN channels; may be given up there."""
        staged = [change for changes in self._staged.values() for change in changes.values()]
        old = self._view
        tenants = {tenant for tenant, fresh in view.fresh.items() if old.fresh.get(tenant) is not fresh}
        changed = [channel for key, channel in view.channels.items() if old.channels.get(key) is not channel]
        gone = [channel for key, channel in old.channels.items() if key not in view.channels]
        turns = _once_in(CHANGES_A_TURN)
        for channel in gone:
            self._channels.get(channel.tenant, {}).pop(channel.key, None)
            tenants.add(channel.tenant)
        for channel in changed:
            self._channels.setdefault(channel.tenant, {})[channel.key] = channel
            tenants.add(channel.tenant)
            if next(turns):
                yield
        tenants.update(change.tenant for change in staged)
        for tenant in tenants:
            self._kept_of[tenant] = frozenset(self._worth_keeping(tenant, view))
            self._most_served.pop(tenant, None)
            if next(turns):
                yield
        self._view, self._kept = view, frozenset().union(*self._kept_of.values())
        for change in staged:
            if self._is_staged(change):
                self._unstage(change)
            if next(turns):
                yield
        self._evict()

    def _worth_keeping(self, tenant: str, view: StateView) -> set[str]:
        """What is served, then what was served before or will be soon, as far as it fits."""
        channels = self._channels.get(tenant, {}).values()
        kept = {release.digest for channel in channels for release in channel.serving}
        room = self._tenant_bytes - sum(self._overlay_sizes(kept))
        more = [release for channel in channels for release in channel.earlier]
        if fresh := view.fresh.get(tenant):
            more.append(fresh.release)
        for release in more:
            (size,) = self._overlay_sizes([release.digest])
            if release.digest not in kept and size <= room:
                kept.add(release.digest)
                room -= size
        return kept

    def _serving(self, tenant: str) -> set[str]:
        """Digests of what a tenant's channels are at, once what is staged holds."""
        channels = dict(self._channels.get(tenant, {}))
        channels |= {key: c for key, c in self._staged.get(tenant, {}).items() if isinstance(c, ChannelState)}
        return {release.digest for channel in channels.values() for release in channel.serving}

    def _overlay_sizes(self, digests: Iterable[str]) -> list[int]:
        return [self._compiled[d].overlay.nbytes if d in self._compiled else 0 for d in digests]

    def stop(self) -> None:
        """End what is computed beside the engine; the next start goes on with it."""
        self._denominators.stop()

    def resident(self) -> frozenset[str]:
        return frozenset(self._compiled)

    def tallies(self) -> tuple[CanaryTally, ...]:
        return ()

    async def restore(self, view: StateView) -> None:
        """Compile what is on disk of a view that was taken up from there, without asking anybody.

        Releases whose denominators aren't there aren't waited for; they are compiled when those are computed.
        """
        for channel in view.channels.values():
            for release in (*channel.serving, *channel.earlier):
                if await asyncio.to_thread(self._blobs.has, release.digest):
                    with suppress(ServiceError, PatchError):
                        await self._get_overlay(channel.tenant, WantedRelease(release.digest), patience=0.0)

    async def tidy(self) -> None:
        """Forget on disk what no channel needs. What can't be removed stays until the next time."""
        try:
            await asyncio.to_thread(self._blobs.forget_all_but, self.needed)
        except OSError as error:
            log.error("what no channel needs can't be removed", error=str(error))


def _once_in(count: int) -> Iterator[bool]:
    """True once in `count` times."""
    return itertools.cycle([False] * (count - 1) + [True])


def _earlier(change: Stageable) -> tuple[ReleaseRef, ...]:
    return change.earlier if isinstance(change, ChannelState) else ()


def _digests(change: Stageable) -> frozenset[str]:
    return frozenset(release.digest for release in (*change.serving, *_earlier(change)))


def _refusal(change: Stageable, release: ReleaseRef, error: ServiceError | PatchError) -> Refusal:
    """A patch that is wrong stays wrong; whatever kept us from getting it may pass."""
    final = isinstance(error, PatchError)
    refused = from_patch_error(error) if isinstance(error, PatchError) else error
    return Refusal(*change.key, release.digest, refused.reason, refused.message, final)
