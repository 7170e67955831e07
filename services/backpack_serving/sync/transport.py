"""Keeps a reader in step over gRPC, for ever, and what it knows on disk."""

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
"""What a stream has still to send; None ends it."""

LONGEST_PAUSE = 5.0
RETRY_SECONDS = 2.0
"""Mean time between attempts at what was refused for a reason that may pass."""

BOOKMARK_WRITE_SECONDS = 0.1
"""Least time between two writes to disk of a position that moved alone, as many writes of the store move it."""


class SyncDelegate(Protocol):
    """Who has a reader: gets ready what arrives, and is told what holds."""

    async def stage(self, work: tuple[Stageable, ...]) -> tuple[Refusal, ...]:
        """Get releases ready to be served; what can't be, with the reason."""

    def swapped(self, view: StateView) -> None:
        """This view holds from now on."""

    def resident(self) -> frozenset[str]:
        """Digests of what is ready."""

    def tallies(self) -> tuple[CanaryTally, ...]:
        """How requests under canaries went."""


class SyncTransport:
    """One reader's life: what is on disk first, then stream after stream."""

    def __init__(self, channel: Any, key: str, client: SyncClient, delegate: SyncDelegate, file: Path) -> None:
        self.client = client
        self._stub, self._key, self._delegate = sync_pb2_grpc.SyncServiceStub(channel), key, delegate
        self._file = SnapshotFile(file)
        self._disk = asyncio.Lock()
        self._on_disk = client.view
        self._bookmarked, self._view_moved = asyncio.Event(), asyncio.Event()

    def restore(self) -> bool:
        """Take up what was known last. Whether anything was."""
        saved = self._file.read()
        if saved is None:
            return False
        try:
            view = wire.read_view(saved.payload)
        except DecodeError as error:  # somebody put another file there: to end here would be to end at every start
            log.error("what was kept isn't what a reader knows", file=str(self._file.path), error=str(error))
            return False
        self._on_disk = view
        self.client.restore(view, time.monotonic() - max(0.0, time.time() - saved.fresh))
        self._delegate.swapped(view)
        log.info("took up what was known last", position=str(view.position), file=str(self._file.path))
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

    async def wait_until(self, position: Position, seconds: float) -> None:
        """Wait until all up to this position holds. If it doesn't within so many seconds, raises Unavailable, or
        PreconditionFailed if the service was heard meanwhile: the store isn't there either.
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
        await self._commit_view()  # what the last stream told
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
                if (message := incoming.read(part)) is None:
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
                        task.result()  # a mistake of ours ends the stream, and is told
        finally:
            outbox.put_nowait(None)
            reporting.cancel()
            if staging:
                staging.cancel()
            await asyncio.gather(reporting, *([staging] if staging else []), return_exceptions=True)

    async def _stage_and_answer(self, pending: PendingDelta, outbox: SendQueue) -> None:
        """Stage, keep, swap, answer."""
        refused = await self._delegate.stage(pending.work) if pending.work else ()
        answer = self.client.apply(pending.nonce, refused, time.monotonic())
        if answer is None:
            return
        await self._commit_view()
        for refusal in refused:
            log.warning("refused", tenant=refusal.tenant, channel=refusal.channel, reason=refusal.reason,
                        digest=refusal.digest, message=refusal.message)  # fmt: skip
        outbox.put_nowait(answer)

    async def _write_bookmarks(self) -> None:
        """Let hold what bookmarks alone have moved."""
        while True:
            await self._bookmarked.wait()
            self._bookmarked.clear()
            await self._commit_view()
            await asyncio.sleep(BOOKMARK_WRITE_SECONDS)

    async def _send_reports(self, outbox: SendQueue) -> None:
        """A sign of life each second; and on disk, that what is there is all there is."""
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
        """Try again what was refused for a reason that may have passed."""
        while True:
            await asyncio.sleep(random.uniform(0, 2 * RETRY_SECONDS))
            for change in self.client.retryable:
                refused = await self._delegate.stage((change,))
                self.client.apply_retry(change, refused[0] if refused else None)
                await self._commit_view()

    async def _commit_view(self) -> None:
        """What is known holds when this returns: it was on disk first, so a restart never goes back."""
        await tasks.finish(self._write_snapshot())  # a write that went on by itself could overtake the next one

    async def _write_snapshot(self) -> None:
        async with self._disk:
            view, at = self.client.state, self.client.state_at
            if view is self._on_disk:
                return
            try:
                await asyncio.to_thread(lambda: self._file.write(wire.write_view(view)))
                self._on_disk = view
            except OSError as error:  # a full disk must not stop what is in memory
                log.error("what is known can't be kept on disk", file=str(self._file.path), error=str(error))
            self.client.commit(view, at)
            self._delegate.swapped(view)
            view_moved, self._view_moved = self._view_moved, asyncio.Event()
            view_moved.set()


async def _requests(outbox: SendQueue) -> AsyncIterator[sync_pb2.SyncRequest]:
    while (message := await outbox.get()) is not None:
        yield wire.write_from_reader(message)


async def with_silence_limit(call: Any) -> AsyncIterator[Any]:
    """The call's messages. Raises TimeoutError after SILENCE: a half-open connection looks just like that."""
    messages = aiter(call)
    try:
        while True:
            try:
                # Not wait_for: that of Python 3.11 forgets a cancellation that comes together with a message.
                async with asyncio.timeout(SILENCE):
                    message = await anext(messages)
            except StopAsyncIteration:
                return
            yield message
    finally:
        call.cancel()


async def _keep_running(loop: Callable[[], Awaitable[None]]) -> None:
    """Run what never ends, and again after a mistake of ours: nobody else would notice."""
    while True:
        try:
            await loop()
        except Exception:
            log.exception("a mistake of ours; going on")
        await asyncio.sleep(RETRY_SECONDS)


async def run_forever(
    run_once: Callable[[], Awaitable[None]], peer: str, on_failure: Callable[[str], None] = lambda reason: None
) -> None:
    """Run `run_once` again and again, with full jitter (exponential, at most LONGEST_PAUSE) between failures.

    `on_failure` is given the word for each, which says nothing of where anybody is.

    Each reason is told once until a stream has lived: what a new server refuses isn't why the last one was lost.
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
        except Exception as error:  # a mistake of ours must not be the end: nobody would be told anything any more
            log.exception("a stream ended by a mistake of ours", peer=peer)
            kind, code = repr(error), "INTERNAL"
            reason = kind
        except asyncio.CancelledError:  # gRPC tells so that it gave a call up; or somebody ends us
            kind = reason = "the call was cancelled"
        # Not what was raised decides: gRPC may also answer a cancellation with the call's own error.
        if task.cancelling():
            raise asyncio.CancelledError
        if asyncio.get_running_loop().time() - started > SILENCE:
            failures = 0
            logged.clear()
        on_failure(code or kind)
        if kind not in logged:
            log_loss = log.info if reason == "max connection age" else log.warning  # our servers end them, on purpose
            log_loss("lost a stream; trying again until it is back", peer=peer, reason=reason)
            logged.add(kind)
        failures += 1
        await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.1 * 2**failures)))
