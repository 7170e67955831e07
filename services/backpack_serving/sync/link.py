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

from backpack_serving import rpc
from backpack_serving.errors import ServiceError, Unavailable
from backpack_serving.sync.known import Position, Steering, View
from backpack_serving.sync.known_good import KnownGood
from backpack_serving.sync.messages import REPORT_SECONDS, SILENCE, FromReader, Refusal, Tally
from backpack_serving.sync.reader import Pending, Reader
from backpack_serving.wire import sync as wire

M = TypeVar("M")

log = structlog.get_logger(__name__)

Outbox = asyncio.Queue[FromReader | None]
"""What a stream has still to send; None ends it."""

LONGEST_PAUSE = 5.0
RETRY_SECONDS = 2.0
"""Mean time between attempts at what was refused for a reason that may pass."""


class Owner(Protocol):
    """Who has a reader: gets ready what arrives, and is told what holds."""

    async def stage(self, work: tuple[Steering, ...]) -> tuple[Refusal, ...]:
        """Get releases ready to be served; what can't be, with the reason."""

    def swapped(self, view: View) -> None:
        """This view holds from now on."""

    def resident(self) -> frozenset[str]:
        """Digests of what is ready."""

    def tallies(self) -> tuple[Tally, ...]:
        """How requests under canaries went."""


class Link:
    """One reader's life: what is on disk first, then stream after stream."""

    def __init__(self, channel: Any, key: str, reader: Reader, owner: Owner, file: Path) -> None:
        self.reader = reader
        self._stub, self._key, self._owner = sync_pb2_grpc.SyncServiceStub(channel), key, owner
        self._file = KnownGood(file)
        self._disk = asyncio.Lock()
        self._written: View | None = None
        self._moved = asyncio.Event()

    def restore(self) -> bool:
        """Take up what was known last. Whether anything was."""
        kept = self._file.read()
        if kept is None:
            return False
        self.reader.view = self._written = wire.read_view(kept.payload)
        self.reader.heard_at(time.monotonic() - max(0.0, time.time() - kept.fresh))
        self._owner.swapped(self.reader.view)
        log.info("took up what was known last", position=str(self.reader.view.position), file=str(self._file.path))
        return True

    async def run(self) -> None:
        """Follow the service until this is cancelled."""
        retrying = asyncio.create_task(self._retry())
        try:
            await for_ever(self._once, "interventions")
        finally:
            retrying.cancel()

    async def reached(self, position: Position, seconds: float) -> None:
        """Wait until this position is known. Raises Unavailable if it isn't within so many seconds."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self.reader.view.position < position:
            moved = self._moved
            try:
                async with asyncio.timeout_at(until):
                    await moved.wait()
            except TimeoutError:
                at = self.reader.view.position
                raise Unavailable(
                    "BEHIND", f"asked for {position}, but this gateway knows the store up to {at}", retry_after=0.5
                ) from None

    async def _once(self) -> None:
        self.reader.resident = self._owner.resident()
        outbox: Outbox = asyncio.Queue()
        outbox.put_nowait(self.reader.hello())
        call = self._stub.Sync(_requests(outbox), metadata=rpc.with_key(self._key))
        incoming, staging = wire.ToReader(), None
        reporting = asyncio.create_task(self._report(outbox))
        nonce = None
        try:
            async for part in alive(call):
                if (message := incoming.read(part)) is None:
                    continue
                before = self.reader.view
                for answer in self.reader.receive(message, time.monotonic()):
                    outbox.put_nowait(answer)
                if self.reader.view is not before:
                    self._tell_moved()
                if (pending := self.reader.pending) and pending.nonce != nonce:
                    nonce = pending.nonce
                    staging = asyncio.create_task(self._settle(pending, outbox))
                if staging and staging.done():
                    staging.result()  # a mistake of ours ends the stream, and is told
        finally:
            outbox.put_nowait(None)
            reporting.cancel()
            if staging:
                staging.cancel()
            await asyncio.gather(reporting, *([staging] if staging else []), return_exceptions=True)

    async def _settle(self, pending: Pending, outbox: Outbox) -> None:
        """Stage, keep, swap, answer: what is served was on disk first, so a restart never goes back."""
        refused = await self._owner.stage(pending.work) if pending.work else ()
        async with self._disk:
            if (view := self.reader.settled(pending.nonce, refused)) is None:
                return
            await self._keep(view)
            answer = self.reader.settle(pending.nonce, refused, time.monotonic())
        for refusal in refused:
            log.warning("refused", tenant=refusal.tenant, channel=refusal.channel, reason=refusal.reason,
                        digest=refusal.digest, message=refusal.message)  # fmt: skip
        self._tell_moved()
        if answer:
            outbox.put_nowait(answer)

    async def _report(self, outbox: Outbox) -> None:
        """A sign of life each second; and what a bookmark has moved or confirmed, onto the disk."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            outbox.put_nowait(self.reader.report(self._owner.tallies()))
            async with self._disk:
                if self.reader.view is not self._written and self.reader.view.position > Position():
                    await self._keep(self.reader.view)
            age = self.reader.age(time.monotonic())
            if age < SILENCE:
                await asyncio.to_thread(self._file.touch, time.time() - age)

    async def _retry(self) -> None:
        """Try again what was refused for a reason that may have passed."""
        while True:
            await asyncio.sleep(random.uniform(0, 2 * RETRY_SECONDS))
            for change in self.reader.retryable:
                refused = await self._owner.stage((change,))
                self.reader.retried(change, refused[0] if refused else None)
                self._tell_moved()

    async def _keep(self, view: View) -> None:
        try:
            await asyncio.to_thread(lambda: self._file.write(wire.write_view(view)))
        except OSError as error:  # a full disk must not stop what is in memory
            log.error("what is known can't be kept on disk", file=str(self._file.path), error=str(error))
        self._written = view

    def _tell_moved(self) -> None:
        self._owner.swapped(self.reader.view)
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()


async def _requests(outbox: Outbox) -> AsyncIterator[sync_pb2.SyncRequest]:
    while (message := await outbox.get()) is not None:
        yield wire.write_from_reader(message)


async def alive(call: Any) -> AsyncIterator[Any]:
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


async def for_ever(once: Callable[[], Awaitable[None]], peer: str) -> None:
    """Run `once` again and again, with full jitter (exponential, at most LONGEST_PAUSE) between failures."""
    failures, told = 0, False
    while True:
        started = asyncio.get_running_loop().time()
        try:
            with rpc.errors():
                await once()
            reason = "the stream ended"
        except (ServiceError, TimeoutError) as error:
            reason = str(error) or "silence"
        if asyncio.get_running_loop().time() - started > SILENCE:
            failures, told = 0, False
        if not told:
            log.warning("lost a stream; trying again until it is back", peer=peer, reason=reason)
            told = True
        failures += 1
        await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.1 * 2**failures)))
