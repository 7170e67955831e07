"""Several ranks as one executor. This process is rank 0: it schedules and draws; the others do what it does.

Others are told of everything in the order in which it happens here, by one message a step: what became of slots and
pages since the last one, and the step. Overlays go as each rank's own part of them, once for all slots that have them.
"""

from __future__ import annotations

import hmac
import math
import pickle
import secrets
import select
import socket
import time
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from backpack_lm.overlay import Overlay
from backpack_lm.sharding import Shard
from torch import Tensor

from backpack_serving.engine.collectives import HUNG, PeerLost
from backpack_serving.engine.executor import Choice, RankLost, Step, choose_tokens
from backpack_serving.engine.runner import Rank, Runner
from backpack_serving.engine.scheduler import Batch

HEARTBEAT = 0.4
"""Seconds between two questions whether a rank is there, while there is no step that would tell."""

ENDING = 1.0
"""Seconds that a rank has to end after the last message."""

PAUSE = 0.05
"""Seconds for which `RankProcess.ended` waits for an end before it returns that there is none."""

HANDSHAKE = 5.0
"""Seconds that a process has to prove that it knows the secret."""

_KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 5000}
"""Seconds, their number, milliseconds. A link raises OSError after 5 s without an acknowledgement: the other machine
has lost power, or the network between. Kernels acknowledge, whatever their processes do: one may load or compute for
any time, and one that hangs isn't noticed by this."""

_LENGTH = 8  # bytes
_NONCE = _PROOF = 32  # bytes


class AuthenticationFailed(ConnectionError):
    """Whoever is at the other end of a connection doesn't know this replica's secret."""


class Link:
    """Messages between two processes of ours, over a connected socket.

    Messages are pickles: none is read before `authenticate` has seen that the other process knows the same secret.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a step is a small message
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if option := getattr(socket, name, None):  # not every system has all
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket = connection

    def authenticate(self, secret: bytes, mine: bytes, theirs: bytes) -> None:
        """Show the other process that this one knows a secret, and have it do so, too; neither sends it.

        `mine` and `theirs` name the two ends, so that what one has shown is of no use for showing it at the other.
        Raises AuthenticationFailed, OSError, TimeoutError or EOFError if the other end doesn't know it in time.
        """
        until, nonce = time.monotonic() + HANDSHAKE, secrets.token_bytes(_NONCE)
        self._socket.settimeout(HANDSHAKE)
        self._socket.sendall(nonce)
        asked = self._exactly(_NONCE, until)
        self._socket.sendall(hmac.digest(secret, mine + asked + nonce, "sha256"))
        if not hmac.compare_digest(self._exactly(_PROOF, until), hmac.digest(secret, theirs + nonce + asked, "sha256")):
            raise AuthenticationFailed("who is at the other end isn't of this replica")

    def send(self, message: object, seconds: float | None = None) -> None:
        """Raises OSError if the other process is gone, TimeoutError if it doesn't read for so long."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._socket.settimeout(seconds)
        self._socket.sendall(len(data).to_bytes(_LENGTH, "little") + data)

    def receive(self, seconds: float | None = None) -> Any:
        """The next message. Raises EOFError or OSError if the other process is gone, TimeoutError."""
        self._socket.settimeout(seconds)
        return pickle.loads(self._exactly(int.from_bytes(self._exactly(_LENGTH), "little")))

    def is_readable(self) -> bool:
        """Whether a message, or the end, has come."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, count: int, until: float = math.inf) -> bytearray:
        data, there = bytearray(count), 0
        while there < count:
            if until < math.inf:
                self._socket.settimeout(max(until - time.monotonic(), 0.001))
            with memoryview(data) as view:
                read = self._socket.recv_into(view[there:])
            if not read:
                raise EOFError("the other process is gone")
            there += read
        return data


class RankProcess(Protocol):
    """A rank's process, wherever it runs."""

    def ended(self) -> str:
        """How it ended, if it did: waits for that for PAUSE."""

    def end(self) -> None:
        """Have it ended within a little more than ENDING seconds. It ends by itself if its link is gone."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another rank, as rank 0 has it."""

    shard: Shard
    process: RankProcess
    link: Link

    def ended(self) -> str:
        """How the process ended, if it did."""
        return self.process.ended()

    def close(self) -> None:
        """Take back the link, which tells the process to end, and wait for that."""
        self.link.close()
        self.process.end()


def follow(link: Link, runner: Runner) -> None:
    """Do what rank 0 does, until it is gone or wants no more."""
    while True:
        try:
            changes, step = link.receive()
        except (EOFError, OSError):
            return
        for change, *arguments in changes:
            _CHANGES[change](runner, *arguments)
        if step is None:
            link.send(None)
        else:
            runner.run(step)


class SeveralRanks:
    """The executor over rank 0 in this process and its peers. Raises RankLost from whatever finds that out."""

    def __init__(self, runner: Runner, rank: Rank, peers: Many[Peer]) -> None:
        self.runner, self._rank, self._peers = runner, rank, peers
        self.config, self.context = runner.config, runner.context
        self.pages, self.page_size = runner.pages, runner.page_size
        self.heartbeat: float | None = HEARTBEAT
        self._changes: list[list[tuple[Any, ...]]] = [[] for _ in peers]
        self._parts: WeakKeyDictionary[Overlay, list[_Part]] = WeakKeyDictionary()
        self._overlays: dict[int, Overlay] = {}  # by slot

    def load(self, overlay: Overlay, first_row: int) -> None:
        own, *others = self._parts_of(overlay)
        self.runner.load_rows(own.rows, first_row)
        for changes, part in zip(self._changes, others, strict=True):
            changes.append(("load_rows", part.rows, first_row))

    def start(self, slot: int, overlay: Overlay, first_row: int) -> None:
        own, *others = self._parts_of(overlay)
        same = next((other for other, held in self._overlays.items() if held is overlay), None)
        self.runner.start(slot, own.overlay, first_row)
        self._overlays[slot] = overlay
        for changes, part in zip(self._changes, others, strict=True):
            changes.append(("start", slot, part.overlay if same is None else same, first_row))

    def set_pages(self, slot: int, start: int, pages: Many[int]) -> None:
        self._everywhere("set_pages", slot, start, pages)

    def copy_page(self, donor: int, page: int, count: int) -> None:
        self._everywhere("copy_page", donor, page, count)

    def reuse(self, slot: int, tokens: Many[int]) -> None:
        self._everywhere("reuse", slot, tokens)

    def stop(self, slot: int) -> None:
        del self._overlays[slot]
        self._everywhere("stop", slot)

    def digest(self, slot: int) -> str:
        return self.runner.digest(slot)

    def execute(self, batch: Batch, ends: Collection[int]) -> list[Choice]:
        step = Step.of(batch)
        self._tell(step)
        try:
            logits = self.runner.run(step)
        except PeerLost as error:
            raise RankLost(self._loss(error)) from None
        return choose_tokens(logits, batch.sampled, ends, self.runner.kernels)

    def check(self) -> None:
        self._tell(None)
        for peer in self._peers:
            try:
                peer.link.receive(HUNG)
            except (EOFError, OSError) as error:
                raise RankLost(self._loss(error)) from None

    def close(self) -> None:
        for peer in self._peers:
            peer.link.close()
        for peer in self._peers:
            peer.close()

    def _everywhere(self, change: str, *arguments: object) -> None:
        _CHANGES[change](self.runner, *arguments)
        for changes in self._changes:
            changes.append((change, *arguments))

    def _tell(self, step: Step | None) -> None:
        """Send what changed, and a step, or the question whether somebody is there."""
        for changes, peer in zip(self._changes, self._peers, strict=True):
            try:
                peer.link.send((changes, step), HUNG)
            except OSError as error:
                raise RankLost(self._loss(error)) from None
            changes.clear()

    def _loss(self, error: Exception) -> str:
        """Which rank is lost, if one has ended; otherwise what was noticed."""
        for peer in self._peers:
            if ended := peer.ended():
                return f"rank {peer.shard.rank} {ended}"
        return f"a rank doesn't answer: {error!r}"

    def _parts_of(self, overlay: Overlay) -> list[_Part]:
        """Each rank's part of an overlay; the same objects as long as the overlay is used."""
        if (parts := self._parts.get(overlay)) is None:
            shards = (self._rank.shard, *(peer.shard for peer in self._peers))
            parts = [_Part.of(overlay, shard.senses(self._rank.whole)) for shard in shards]
            self._parts[overlay] = parts
        return parts


class _Part(NamedTuple):
    """A rank's part of an overlay: its rows, which are loaded by themselves, and the rest."""

    rows: Tensor
    overlay: Overlay

    @classmethod
    def of(cls, overlay: Overlay, senses: range) -> _Part:
        part = overlay.of_senses(senses)
        rows, part.rows = part.rows, part.rows[:0].clone()
        return cls(rows, part)


def _start(runner: Runner, slot: int, overlay: Overlay | int, first_row: int) -> None:
    """By an overlay, or by the slot that has the same."""
    runner.start(slot, runner.overlay(overlay) if isinstance(overlay, int) else overlay, first_row)


_CHANGES: Mapping[str, Callable[..., None]] = {
    "load_rows": Runner.load_rows,
    "start": _start,
    "set_pages": Runner.set_pages,
    "copy_page": Runner.copy_page,
    "reuse": Runner.reuse,
    "stop": Runner.stop,
}
"""What a rank does when it is told of a change."""
