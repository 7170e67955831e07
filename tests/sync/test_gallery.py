"""The bug gallery of staying in step: each fault is switched on, and the check for it has to fail."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.installed import folder_of
from backpack_lm.patch import Cell, ReleaseContent, ScaleEdit
from backpack_serving.gateway.registry import RegistrySnapshot
from backpack_serving.inference import release_cache
from backpack_serving.inference.release_cache import ReleaseCache
from backpack_serving.inference.release_files import ReleaseFiles
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.references import Pin, Position
from backpack_serving.sync import snapshot_file
from backpack_serving.sync.client import PendingDelta, SyncClient
from backpack_serving.sync.messages import Ack, Bookmark, Delta, Nack, Snapshot
from backpack_serving.sync.server import SyncServer
from backpack_serving.sync.snapshot_file import SnapshotFile
from backpack_serving.sync.state import CanarySplit, Stageable, StateView

from tests.gateway import test_registry
from tests.inference import test_release_cache
from tests.sync import test_snapshot_file
from tests.sync.test_schedules import run

Patch = pytest.MonkeyPatch


def _nack_loop(patch: Patch) -> None:
    """One refused channel keeps a delta from being applied, and it is sent again at once."""
    take, apply = SyncServer.receive, SyncClient.apply

    def receive(self: SyncServer, message: Any, now: float) -> None:
        if isinstance(message, Nack):
            self.in_flight = None
        take(self, message, now)

    def all_or_nothing(self: SyncClient, nonce: int, refused: Iterable[Any], now: float) -> Any:
        refused = list(refused)
        if refused and self.pending and self.pending.nonce == nonce:
            self.pending = None
            return Nack(nonce, tuple(refused))
        return apply(self, nonce, refused, now)

    patch.setattr(SyncServer, "receive", receive)
    patch.setattr(SyncClient, "apply", all_or_nothing)


def _any_nonce(patch: Patch) -> None:
    """An answer to an earlier delta counts for the one that is under way."""
    receive = SyncServer.receive

    def any_nonce(self: SyncServer, message: Any, now: float) -> None:
        if isinstance(message, Ack | Nack) and self.in_flight:
            message = replace(message, nonce=self.in_flight.nonce)
        receive(self, message, now)

    patch.setattr(SyncServer, "receive", any_nonce)


def _swap_in_two_steps(patch: Patch) -> None:
    """The position moves at once, the second half of the changes with the next message."""
    changed, rest = StateView.changed, []

    def halves(self: StateView, position: Position, changes: Iterable[Any]) -> StateView:
        now = [*rest, *changes]
        rest[:] = now[len(now) // 2 + 1 :]
        return changed(self, position, now[: len(now) // 2 + 1])

    patch.setattr(StateView, "changed", halves)


def _swap_before_staging(patch: Patch) -> None:
    """What arrives holds before it is ready."""
    receive = SyncClient.receive

    def early(self: SyncClient, message: Any, now: float) -> Any:
        before = self.pending
        answers = receive(self, message, now)
        if self.pending and self.pending is not before:
            self.view = self.view.changed(self.pending.position, self.pending.changes)
        return answers

    patch.setattr(SyncClient, "receive", early)


def _refused_holds_all_the_same(patch: Patch) -> None:
    """A Nack is sent, but the refused release is put in place."""
    patch.setattr(PendingDelta, "without", lambda self, refusals: list(self.changes))


def _goes_back(patch: Patch) -> None:
    """An older snapshot or delta is applied as well."""
    receive = SyncClient.receive

    def take(self: SyncClient, message: Any, now: float) -> Any:
        if isinstance(message, Snapshot | Delta) and message.position <= self.state.position:
            work = tuple(c for c in message.changes if isinstance(c, Stageable))
            self.pending = PendingDelta(message.nonce, message.position, message.changes, work)
            return ()
        return receive(self, message, now)

    patch.setattr(SyncClient, "receive", take)


def _gap_is_overlooked(patch: Patch) -> None:
    """A delta is applied whatever it builds on."""
    receive = SyncClient.receive

    def careless(self: SyncClient, message: Any, now: float) -> Any:
        if isinstance(message, Delta) and message.position > self.state.position:
            message = Snapshot(message.nonce, message.position, message.changes)  # which builds on nothing
        return receive(self, message, now)

    patch.setattr(SyncClient, "receive", careless)


def _absence_is_deletion(patch: Patch) -> None:
    """A snapshot replaces everything."""
    receive = SyncClient.receive

    def forget(self: SyncClient, message: Any, now: float) -> Any:
        if isinstance(message, Snapshot) and message.position > self.state.position:
            self.state = StateView(self.state.position)
        return receive(self, message, now)

    patch.setattr(SyncClient, "receive", forget)


def _bookmark_of_the_head(patch: Patch) -> None:
    """A bookmark promises what is still under way."""
    pump = SyncServer.pump

    def hasty(self: SyncServer, now: float) -> Any:
        head = self.history.head
        return [Bookmark(head) if isinstance(m, Bookmark) else m for m in pump(self, now)]

    patch.setattr(SyncServer, "pump", hasty)


def _half_open_for_ever(patch: Patch) -> None:
    """The service waits for a reader that it can't hear."""
    patch.setattr("backpack_serving.sync.server.SILENCE", float("inf"))


def _asks_for_little_after_a_start(patch: Patch) -> None:
    """A reader that has forgotten what it refused asks only for what came later."""
    make = SyncClient.__init__

    def unaware(self: SyncClient, *args: Any, **more: Any) -> None:
        make(self, *args, **more)
        self.needs_snapshot = False

    patch.setattr(SyncClient, "__init__", unaware)


def _bookmark_holds_before_it_is_on_disk(patch: Patch) -> None:
    """A position that moves alone holds at once, and is written some time later."""
    receive = SyncClient.receive

    def at_once(self: SyncClient, message: Any, now: float) -> Any:
        answers = receive(self, message, now)
        if isinstance(message, Bookmark):
            self.view = replace(self.view, position=self.state.position)
        return answers

    patch.setattr(SyncClient, "receive", at_once)


def _truncating_write(patch: Patch) -> None:
    """The file on disk is written in place."""

    def write(self: SnapshotFile, payload: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(snapshot_file.seal(payload))
            file.flush()
            os.fsync(file.fileno())

    patch.setattr(SnapshotFile, "write", write)


def _checksum_is_not_looked_at(patch: Patch) -> None:
    """A damaged file is taken for a whole one."""
    start = len(snapshot_file.seal(b""))
    patch.setattr(snapshot_file, "unseal", lambda data: data[start:])


def _canary_is_drawn_each_time(patch: Patch) -> None:
    """A canary doesn't stick to its request keys."""
    patch.setattr(CanarySplit, "takes", lambda self, key: random.random() * 1000 < self.permille)


def _missing_tenant_filter(patch: Patch) -> None:
    """A channel is found by its name alone."""
    pin = RegistrySnapshot.channel

    def any_tenant(self: RegistrySnapshot, tenant: str, channel: str, request_key: str = "") -> Pin:
        owner = next(t for t, c in self.view.channels if c == channel)
        return pin(self, owner, channel, request_key)

    patch.setattr(RegistrySnapshot, "channel", any_tenant)


def _eviction_of_what_is_in_use(patch: Patch) -> None:
    """The least recently used release goes, though a request runs under it."""
    patch.setattr(ReleaseCache, "is_needed", lambda self, digest: False)


def _digest_is_not_verified(patch: Patch) -> None:
    """Whatever was fetched is compiled."""
    patch.setattr(release_cache, "check_digest", lambda revisions, digest: None)


def _not_validated_again(patch: Patch) -> None:
    """What the store says is right is taken for right."""
    patch.setattr(ReleaseContent, "validate", lambda self, *_: None)


def _not_tried_out(patch: Patch) -> None:
    """Nobody looks whether the model predicts numbers."""
    patch.setattr(ServedModel, "try_out", lambda self, overlay: None)


def _schedules(_: Path) -> None:
    for seed in range(40):
        run(seed)


def _cut_writes(folder: Path) -> None:
    test_snapshot_file.test_a_write_cut_off_anywhere_leaves_the_old_or_the_new(folder)


def _damaged(folder: Path) -> None:
    test_snapshot_file.test_a_damaged_file_is_never_used_the_one_before_it_is(SnapshotFile(folder / "cache" / "view"))


def _told() -> test_registry.Told:
    told = test_registry.Told()
    told.hear((1, 7), test_registry.KNOWN, test_registry.LIVE, whole=True)
    return told


def _with_a_cache(folder: Path, check: Callable[..., Any], *more: object) -> None:
    served, shelf = ServedModel.read(folder_of("micro")), test_release_cache.Shelf()

    def make(capacity: int = 2, tenant_bytes: int = 2**26) -> ReleaseCache:
        return ReleaseCache(served, shelf.fetch, ReleaseFiles(folder / "blobs"), capacity, tenant_bytes)

    asyncio.run(check(served, shelf, make, *more))


def _residents(folder: Path) -> None:
    _with_a_cache(folder, test_release_cache.test_what_channels_need_stays_and_of_the_rest_what_was_used_last)


def _fuzz(folder: Path) -> None:
    _with_a_cache(folder, test_release_cache.test_p9_fuzzed_bytes_are_never_served)


def _applied_again(edits: Callable[..., Any], reason: str) -> Callable[[Path], None]:
    check = test_release_cache.test_p14_what_was_stored_wrongly_is_refused_again_where_it_is_applied
    return lambda folder: _with_a_cache(folder, check, edits, reason)


GALLERY: dict[Callable[[Patch], None], Callable[[Path], None]] = {
    _nack_loop: _schedules,
    _any_nonce: _schedules,
    _swap_in_two_steps: _schedules,
    _swap_before_staging: _schedules,
    _refused_holds_all_the_same: _schedules,
    _goes_back: _schedules,
    _gap_is_overlooked: _schedules,
    _absence_is_deletion: _schedules,
    _bookmark_of_the_head: _schedules,
    _half_open_for_ever: _schedules,
    _asks_for_little_after_a_start: _schedules,
    _bookmark_holds_before_it_is_on_disk: _schedules,
    _truncating_write: _cut_writes,
    _checksum_is_not_looked_at: _damaged,
    _canary_is_drawn_each_time: lambda _: (
        test_registry.test_a_canary_takes_its_share_of_the_keys_and_the_same_ones_always(_told())
    ),
    _eviction_of_what_is_in_use: _residents,
    _digest_is_not_verified: _fuzz,
    _not_validated_again: _applied_again(lambda s: (ScaleEdit((Cell(5, 0),), 1.0),), "ZERO_EFFECT"),
    _not_tried_out: _applied_again(lambda s: test_release_cache.hidden_overflow(s, 5, 3e38), "NON_FINITE"),
    _missing_tenant_filter: lambda _: test_registry.test_a_channel_of_another_tenant_is_not_there(_told().registry),
}


@pytest.mark.parametrize("fault", GALLERY, ids=lambda f: f.__name__.strip("_"))
def test_the_suite_catches(fault: Callable[[Patch], None], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            GALLERY[fault](tmp_path)


def test_without_a_fault_the_checks_pass(tmp_path: Path) -> None:
    for check in dict.fromkeys(GALLERY.values()):
        check(tmp_path)
