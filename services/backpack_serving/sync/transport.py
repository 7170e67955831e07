"""Runs a `SyncClient` over gRPC, for ever, and keeps its view on disk."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog
from backpack_proto.v1 import sync_pb2, sync_pb2_grpc
from google.protobuf.message import DecodeError

from backpack_serving import rpc, tasks
from backpack_serving.errors import PreconditionFailed, ServiceError, Unavailable
from backpack_serving.references import CanaryTally, Position, Refusal
from backpack_serving.sync import wire as wire
from backpack_serving.sync.client import PendingDelta, SyncClient
from backpack_serving.sync.messages import REPORT_SECONDS, SILENCE, FromReader
from backpack_serving.sync.snapshot_file import SnapshotFile
from backpack_serving.sync.state import Stageable, StateView

M = TypeVar("M")

log = structlog.get_logger(__name__)

SendQueue = asyncio.Queue[FromReader | None]
"""Messages that a stream still has to send; None ends it."""

LONGEST_PAUSE = 5.0
RETRY_SECONDS = 2.0
"""Mean seconds between attempts to stage what was refused for a temporary reason."""

MANY_CHANGES = 1000
"""Beyond so many changes, a message is read and applied in a thread: a process's streams don't wait for it."""

BOOKMARK_WRITE_SECONDS = 0.1
"""Least seconds between two writes to disk of a position that only bookmarks moved."""


class SyncDelegate(Protocol):
    """Stages what arrives, and learns which view is in effect."""

    async def stage(self, work: tuple[Stageable, ...]) -> tuple[Refusal, ...]:
        """Get releases ready to be served; returns refusals, with reasons, of those that can't be."""

    def swapped(self, view: StateView) -> None:
        """This view is in effect from now on."""

    def resident(self) -> frozenset[str]:
        """Digests of the releases that are ready."""

    def tallies(self) -> tuple[CanaryTally, ...]:
        """Counts of requests under canaries."""


class SyncTransport:
    """Connects a client: restores its view from disk, then opens stream after stream."""

    def __init__(self, channel: Any, key: str, client: SyncClient, delegate: SyncDelegate, file: Path) -> None:
        self.client = client
        self._stub, self._key, self._delegate = sync_pb2_grpc.SyncServiceStub(channel), key, delegate
        self._file, self._encoder = SnapshotFile(file), wire.ViewEncoder()
        self._disk = asyncio.Lock()
        self._on_disk = client.view
        self._bookmarked, self._view_moved = asyncio.Event(), asyncio.Event()

    def restore(self) -> bool:
        """Restore the view from disk; returns whether there was one."""
        saved = self._file.read()
        if saved is None:
            return False
        try:
            view = wire.read_view(saved.payload)
        except DecodeError as error:  # another file; exiting here would mean exiting at every start
            log.error("the view file isn't a snapshot; ignoring it", file=str(self._file.path), error=str(error))
            return False
        self._on_disk = view
        self.client.restore(view, time.monotonic() - max(0.0, time.time() - saved.fresh))
        self._delegate.swapped(view)
        log.info("restored the last view from disk", position=str(view.position), file=str(self._file.path))
        return True

    async def run(self) -> None:
        """Follow the service until this is cancelled."""
        background = (
            asyncio.create_task(_keep_running(self._retry_refused)),
            asyncio.create_task(_keep_running(self._write_bookmarks)),
        )
        try:
            await run_forever(self._run_stream, "interventions", self._record_error)
        finally:
            await tasks.end(*background)

    def next_view(self) -> asyncio.Event:
        """An event that the next view sets when it takes effect."""
        return self._view_moved

    async def wait_until(self, position: Position, seconds: float) -> None:
        """Wait until the view has reached a position.

        After so many seconds raises Unavailable, or PreconditionFailed if the service was heard meanwhile, since then
        the store itself hasn't reached the position.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self.client.view.position < position:
            view_moved = self._view_moved
            try:
                async with asyncio.timeout_at(until):
                    await view_moved.wait()
            except TimeoutError:
                at = self.client.view.position
                if self.client.age(time.monotonic()) < seconds:
                    message = f"asked for {position}, but the store is at {at}: nobody has written that yet"
                    raise PreconditionFailed("NOT_WRITTEN", message) from None
                raise Unavailable(
                    "BEHIND", f"asked for {position}, but this gateway knows the store up to {at}", retry_after=0.5
                ) from None

    def _record_error(self, reason: str) -> None:
        self.client.last_error = reason

    async def _run_stream(self) -> None:
        await self._commit_view()  # what the last stream brought
        self.client.resident = self._delegate.resident()
        outbox: SendQueue = asyncio.Queue()
        outbox.put_nowait(self.client.hello())
        call = self._stub.Sync(_requests(outbox), metadata=rpc.with_key(self._key))
        incoming, staging = wire.SnapshotAssembler(), None
        reporting = asyncio.create_task(self._send_reports(outbox))
        nonce = None
        try:
            async for part in with_silence_limit(call):
                self.client.last_error = ""
                if wire.count_changes(part) > MANY_CHANGES:
                    message = await asyncio.to_thread(incoming.read, part)
                else:
                    message = incoming.read(part)
                if message is None:
                    continue
                if answers := self.client.receive(message, time.monotonic()):
                    await self._commit_view()
                    for answer in answers:
                        outbox.put_nowait(answer)
                if self.client.state is not self.client.view:
                    self._bookmarked.set()
                if (pending := self.client.pending) and pending.nonce != nonce:
                    nonce = pending.nonce
                    staging = asyncio.create_task(self._stage_and_answer(pending, outbox))
                for task in (reporting, staging):
                    if task and task.done():
                        task.result()  # a bug of ours ends the stream, and is logged
        finally:
            outbox.put_nowait(None)
            reporting.cancel()
            if staging:
                staging.cancel()
            await asyncio.gather(reporting, *([staging] if staging else []), return_exceptions=True)

    async def _stage_and_answer(self, pending: PendingDelta, outbox: SendQueue) -> None:
        """Stage a delta, write the state to disk, put it into effect, and answer."""
        refused = await self._delegate.stage(pending.work) if pending.work else ()
        prepared = None
        if len(pending.changes) > MANY_CHANGES:
            prepared = await asyncio.to_thread(self.client.prepare, pending.nonce, refused)
        answer = self.client.apply(pending.nonce, refused, time.monotonic(), prepared)
        if answer is None:
            return
        await self._commit_view()
        for refusal in refused:
            log.warning("refused", tenant=refusal.tenant, channel=refusal.channel, reason=refusal.reason,
                        digest=refusal.digest, message=refusal.message)  # fmt: skip
        outbox.put_nowait(answer)

    async def _write_bookmarks(self) -> None:
        """Commit positions that only bookmarks moved."""
        while True:
            await self._bookmarked.wait()
            self._bookmarked.clear()
            await self._commit_view()
            await asyncio.sleep(BOOKMARK_WRITE_SECONDS)

    async def _send_reports(self, outbox: SendQueue) -> None:
        """Send a report each second, and note on disk that the view is still complete."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            outbox.put_nowait(self.client.report(self._delegate.tallies(), len(self._delegate.resident())))
            await self._commit_view()  # in case the disk was full
            age = self.client.age(time.monotonic())
            if age < SILENCE and self._on_disk is self.client.view:
                try:
                    await asyncio.to_thread(self._file.touch, time.time() - age)
                except OSError as error:
                    log.error("what is known looks older than it is", file=str(self._file.path), error=str(error))

    async def _retry_refused(self) -> None:
        """Stage again what was refused for a temporary reason."""
        while True:
            await asyncio.sleep(random.uniform(0, 2 * RETRY_SECONDS))
            for change in self.client.retryable:
                refused = await self._delegate.stage((change,))
                self.client.apply_retry(change, refused[0] if refused else None)
                await self._commit_view()

    async def _commit_view(self) -> None:
        """Write `state` to disk, then put it into effect: so a restart never goes back."""
        await tasks.finish(self._write_snapshot())  # an abandoned write could overtake the next one

    async def _write_snapshot(self) -> None:
        async with self._disk:
            view, at = self.client.state, self.client.state_at
            if view is self._on_disk:
                return
            try:
                await asyncio.to_thread(lambda: self._file.write(self._encoder.encode(view)))
                self._on_disk = view
            except OSError as error:  # a full disk must not stop what is in memory
                log.error(
                    "can't write the view to disk; it takes effect in memory only",
                    file=str(self._file.path),
                    error=str(error),
                )
            self.client.commit(view, at)
            self._delegate.swapped(view)
            view_moved, self._view_moved = self._view_moved, asyncio.Event()
            view_moved.set()


async def _requests(outbox: SendQueue) -> AsyncIterator[sync_pb2.SyncRequest]:
    while (message := await outbox.get()) is not None:
        yield wire.write_from_reader(message)


async def with_silence_limit(call: Any) -> AsyncIterator[Any]:
    """Yield the call's messages. Raises TimeoutError after SILENCE, because a half-open connection is just silent."""
    messages = aiter(call)
    try:
        while True:
            try:
                # Not wait_for: in Python 3.11 it loses a cancellation that arrives together with a message.
                async with asyncio.timeout(SILENCE):
                    message = await anext(messages)
            except StopAsyncIteration:
                return
            yield message
    finally:
        call.cancel()


async def _keep_running(loop: Callable[[], Awaitable[None]]) -> None:
    """Run a loop that never ends, and restart it after a bug of ours, which nobody else would notice."""
    while True:
        try:
            await loop()
        except Exception:
            log.exception("a mistake of ours; going on")
        await asyncio.sleep(RETRY_SECONDS)


async def run_forever(
    run_once: Callable[[], Awaitable[None]], peer: str, on_failure: Callable[[str], None] = lambda reason: None
) -> None:
    """Call `run_once` again and again, with exponential backoff and full jitter (at most LONGEST_PAUSE) after failures.

    `on_failure` gets a word for each failure, without addresses. Each reason is logged once until a stream has lived
    for longer than SILENCE.
    """
    failures, task = 0, asyncio.current_task()
    logged: set[str] = set()
    assert task is not None
    while True:
        started, code = asyncio.get_running_loop().time(), ""
        try:
            with rpc.errors():
                await run_once()
            kind = reason = "the stream ended"
        except ServiceError as error:
            kind, reason = error.reason, error.message
        except TimeoutError:
            kind = reason = "silence"
        except Exception as error:  # a bug of ours must not end the process's updates
            log.exception("a stream ended by a mistake of ours", peer=peer)
            kind, code = repr(error), "INTERNAL"
            reason = kind
        except asyncio.CancelledError:  # gRPC gave the call up, or somebody cancelled us
            kind = reason = "the call was cancelled"
        # The exception doesn't decide: gRPC may answer a cancellation with the call's own error.
        if task.cancelling():
            raise asyncio.CancelledError
        if asyncio.get_running_loop().time() - started > SILENCE:
            failures = 0
            logged.clear()
        on_failure(code or kind)
        if kind not in logged:
            log_loss = (
                log.info if reason == "max connection age" else log.warning
            )  # our servers end streams of that age on purpose
            log_loss("lost a stream; trying again until it is back", peer=peer, reason=reason)
            logged.add(kind)
        failures += 1
        await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.1 * 2**failures)))
