"""A service, its readers and the network between them, in one thread, under a clock and dice of our own.

The two state machines are the real ones. Around them everything may go wrong: messages are late, come twice, or
come from a stream that is gone; streams break at once, or silently at one end; either side restarts, the reader
with or without what it had on disk; fetching fails; a release is bad; the log is compacted; a backup is restored.
After each step every reader must hold exactly what the history says of its position, and when faults end, all must
catch up.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from backpack_serving.auth.keys import Principal, Role, Verifier
from backpack_serving.errors import ServiceError
from backpack_serving.references import Position, ReaderKind, Refusal, ReleaseRef
from backpack_serving.sync import client as client_room
from backpack_serving.sync import server as server_room
from backpack_serving.sync.messages import SILENCE, FromReader, ToReader
from backpack_serving.sync.server import HistoryPage
from backpack_serving.sync.state import (
    CanarySplit,
    ChannelState,
    KeyState,
    Stageable,
    StateEntry,
    StateView,
    TenantState,
)

MODEL = "ab" * 32
TENANTS = [f"t{n}" for n in range(5)]


@dataclass
class Dice:
    """How often things go wrong, as probabilities of each message or second."""

    drop: float = 0.02
    twice: float = 0.03
    late: float = 0.06
    half_open: float = 0.01
    restart: float = 0.02
    lose_disk: float = 0.5
    service_restart: float = 0.02
    compact: float = 0.05
    restore: float = 0.01
    fetch_fails: float = 0.15
    bad_release: float = 0.1
    delay: float = 0.3


class History:
    """The store's log, and what it amounted to at each position: what every reader is held to."""

    def __init__(self, draw: random.Random, dice: Dice) -> None:
        self._draw, self._dice = draw, dice
        self.head = Position(1, 0)
        self._kept = 0
        self._log: list[StateEntry] = []
        self.state: dict[Any, StateEntry] = {}
        self.states: dict[Position, dict[Any, StateEntry]] = {self.head: {}}
        self.ever: dict[Any, set[StateEntry]] = {}
        self.bad: set[str] = set()
        self.writes: Counter[tuple[str, str, str]] = Counter()

    @property
    def fingerprint(self) -> str:
        return MODEL

    def at_hand(self, revision: int) -> bool:
        return True

    def snapshot(self, at_least: Position) -> HistoryPage:
        assert self.head >= at_least
        return HistoryPage(self.head, self.head, tuple(self.state.values()))

    def since(self, revision: int) -> HistoryPage | None:
        if revision < self._kept:
            return None
        upto = min(self.head.revision, revision + self._draw.randint(1, 5))
        return HistoryPage(self.head, Position(self.head.epoch, max(upto, revision)), tuple(self._log[revision:upto]))

    def write(self) -> None:
        """One more revision: a key, a tenant that is suspended or resumed, or a channel that moves."""
        tenant, draw = self._draw.choice(TENANTS), self._draw
        change: StateEntry
        if draw.random() < 0.2:
            who = Principal(tenant, f"key-{tenant}-{draw.randint(0, 2)}", frozenset({Role.CALLER}))
            change = KeyState(who, Verifier(b"", b""), revoked=draw.random() < 0.3)
        elif draw.random() < 0.3:  # always the same one: what one message tells has several of its changes
            change = TenantState(TENANTS[0], suspended=draw.random() < 0.5)
        else:
            change = self._channel(tenant, draw.choice(["live", "beta"]))
        self.head = Position(self.head.epoch, self.head.revision + 1)
        self._log.append(change)
        self._remember(change)
        self.states[self.head] = self.state

    def compact(self) -> None:
        self._kept = self._draw.randint(self._kept, self.head.revision)

    def restore(self) -> None:
        """An older state comes back, in a new epoch."""
        revision = self._draw.randint(max(0, self.head.revision - 10), self.head.revision)
        self.state = self.states[Position(self.head.epoch, revision)]
        self._log = self._log[:revision]
        self._kept = min(self._kept, revision)
        for change in self.state.values():
            self._remember(change)
        self.head = Position(self.head.epoch + 1, revision)
        for at in range(revision + 1):  # of the new epoch only what comes is known; what was is the snapshot's
            self.states.setdefault(Position(self.head.epoch, at), self.state)

    def _channel(self, tenant: str, name: str) -> ChannelState:
        release = self._release(tenant)
        old = self.state.get((tenant, name))
        canary = CanarySplit(self._release(tenant), 100, "salt") if self._draw.random() < 0.2 else None
        if isinstance(old, ChannelState):
            if canary:
                return replace(old, canary=canary)
            return ChannelState(tenant, name, release, None, (old.stable, *old.earlier)[:2])
        return ChannelState(tenant, name, release)

    def _release(self, tenant: str) -> ReleaseRef:
        number = self._draw.randint(0, 40)
        digest = f"{tenant}-{number}"
        if number and self._draw.random() < self._dice.bad_release and digest not in self.ever.get("digests", set()):
            self.bad.add(digest)
        self.ever.setdefault("digests", set()).add(digest)  # type: ignore[arg-type]
        return ReleaseRef(number, digest)

    def _remember(self, change: StateEntry) -> None:
        self.state = {**self.state, change.key: change}
        self.ever.setdefault(change.key, set()).add(change)
        if isinstance(change, ChannelState):
            for release in change.serving:
                self.writes[change.tenant, change.channel, release.digest] += 1


class World:
    """Time, and what happens in it."""

    def __init__(self, seed: int, readers: int = 3, dice: Dice | None = None) -> None:
        self.draw = random.Random(seed)
        self.dice = dice or Dice()
        self.calm = False
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.history = History(self.draw, self.dice)
        self.service = Service(self)
        kinds = [ReaderKind.GATEWAY if n % 2 else ReaderKind.REPLICA for n in range(readers)]
        self.clients = [Node(self, f"r{n}", kind) for n, kind in enumerate(kinds)]
        self.counts: Counter[str] = Counter()

    def chance(self, of: float) -> bool:
        return not self.calm and self.draw.random() < of

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), act))

    def run(self, seconds: float) -> None:
        """Let time pass. Every reader is checked after every event."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, act = heapq.heappop(self._queue)
            act()
            for node in self.clients:
                node.check()
            self.counts["events"] += 1
        self.now = end

    def trouble(self, seconds: float) -> None:
        """Writes and faults for a while."""
        for tick in range(int(seconds * 10)):
            self.after(tick / 10, self._tick)
        self.run(seconds)

    def _tick(self) -> None:
        dice = self.dice
        if self.draw.random() < 0.4:
            self.history.write()
            self.service.rung()
        if self.chance(dice.service_restart):
            self.service.restart()
        if self.chance(dice.compact):
            self.history.compact()
        if self.chance(dice.restore):
            self.history.restore()
            self.service.restart() if self.draw.random() < 0.5 else self.service.rung()
        for node in self.clients:
            if self.chance(dice.restart):
                node.restart()

    def settle(self) -> None:
        """No more faults: everyone must have caught up well before this ends, and then be quiet."""
        self.calm = True
        self.run(40)
        before = self.service.sent
        self.run(10)
        assert self.service.sent - before <= 25 * len(self.clients), "the service doesn't come to rest"
        for node in self.clients:
            node.check_caught_up()


class Wire:
    """One stream. Messages of one direction keep their order; the ends learn of a break, or don't."""

    def __init__(self, world: World, node: Node) -> None:
        self.world, self.node = world, node
        self.server: server_room.SyncServer | None = world.service.accept(self)
        self.open_for_node = self.open_for_service = True
        self._clear = {"up": 0.0, "down": 0.0}

    def up(self, message: FromReader) -> None:
        self._carry("up", lambda: self.world.service.receive(self, message))

    def down(self, message: ToReader) -> None:
        self._carry("down", lambda: self.node.receive(self, message))
        if self.world.chance(self.world.dice.late):
            # The same once more, long after, on whatever stream there is by then.
            node, later = self.node, self.world.draw.random() * 8
            self.world.after(later, lambda: node.receive(node.wire, message) if node.wire else None)

    def _carry(self, way: str, deliver: Callable[[], None]) -> None:
        world, dice = self.world, self.world.dice
        if world.chance(dice.drop):
            self.cut()
        if world.chance(dice.half_open):
            end = world.draw.choice(["open_for_node", "open_for_service"])
            setattr(self, end, False)
        at = max(self._clear[way], world.now + world.draw.random() * (dice.delay if not world.calm else 0.02))
        self._clear[way] = at
        for _ in range(1 + world.chance(dice.twice)):
            world.after(at - world.now, deliver)

    def cut(self) -> None:
        """Both ends learn of it."""
        self.open_for_node = self.open_for_service = False
        self.world.service.forget(self)
        self.world.after(0.05, lambda: self.node.lost(self))


class Service:
    """The service's process: a session for each stream."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.servers: dict[Wire, server_room.SyncServer] = {}
        self.sent = 0
        self._nonces = itertools.count(world.draw.getrandbits(40))

    def accept(self, wire: Wire) -> server_room.SyncServer:
        server = server_room.SyncServer(self.world.history, self._nonces)
        self.servers[wire] = server
        self._wake(wire)
        return server

    def receive(self, wire: Wire, message: FromReader) -> None:
        if wire.open_for_service and wire in self.servers:
            self.servers[wire].receive(message, self.world.now)
            self.pump(wire)

    def pump(self, wire: Wire) -> None:
        server = self.servers[wire]
        try:
            for message in server.pump(self.world.now):
                self.sent += 1
                wire.down(message)
        except ServiceError:
            wire.cut()

    def rung(self) -> None:
        for wire in list(self.servers):
            if wire in self.servers:
                self.pump(wire)

    def restart(self) -> None:
        for wire in list(self.servers):
            wire.cut()

    def forget(self, wire: Wire) -> None:
        self.servers.pop(wire, None)

    def _wake(self, wire: Wire) -> None:
        if wire in self.servers:
            self.pump(wire)
            self.world.after(0.25, lambda: self._wake(wire))


@dataclass
class Node:
    """A reader's process: connects, stages, keeps on disk, which takes a moment, lets it hold, answers."""

    world: World
    name: str
    kind: ReaderKind
    disk: StateView = field(default_factory=StateView)
    staged: set[str] = field(default_factory=set)
    attempts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    seen: Position = field(default_factory=Position)
    known: set[tuple[str, str]] = field(default_factory=set)
    refused: set[tuple[str, str]] = field(default_factory=set)
    lacking: set[tuple[str, str]] = field(default_factory=set)
    writing: tuple[StateView, set[tuple[str, str]]] | None = None
    waiting: list[Callable[[], None]] = field(default_factory=list)
    wire: Wire | None = None
    lives: int = 0

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.lives += 1
        self.attempts.clear()
        self.client = client_room.SyncClient(self.kind, f"{self.name}-{self.lives}", self.name, MODEL, self.disk)
        self.heard = self.world.now
        self._connect(self.lives)
        self._beat(self.lives)

    def restart(self) -> None:
        if self.wire:
            self.wire.cut()
        self.wire = None
        self.staged.clear()
        if self.writing and self.world.draw.random() < 0.5:  # the write that was cut off was over, or wasn't begun
            self.disk, self.refused = self.writing
        self.writing = None
        self.waiting.clear()
        # What was refused isn't in the view on disk, and why isn't remembered: the first snapshot tells again.
        self.lacking |= self.refused
        self.refused = set()
        if self.world.chance(self.world.dice.lose_disk):
            self.disk, self.seen = StateView(), Position()
            self.known.clear()
        else:
            self.staged = {r.digest for c in self.disk.channels.values() for r in c.serving}
        self._start()

    def receive(self, wire: Wire, message: ToReader) -> None:
        if self.wire is not wire or not wire.open_for_node:
            return
        self.heard = self.world.now
        answers = self.client.receive(message, self.world.now)
        if answers or self.client.state is not self.client.view:
            self._keep(lambda: [wire.up(answer) for answer in answers])
        if pending := self.client.pending:
            self._stage(wire, pending)

    def lost(self, wire: Wire) -> None:
        if self.wire is wire:
            self.wire = None
            life = self.lives
            self.world.after(self.world.draw.random(), lambda: self._connect(life))

    def _connect(self, life: int) -> None:
        if life == self.lives and self.wire is None:
            self.wire = Wire(self.world, self)
            self.heard = self.world.now
            wire, hello = self.wire, self.client.hello()
            self._keep(lambda: wire.up(hello))

    def _beat(self, life: int) -> None:
        if life != self.lives:
            return
        if self.wire and self.world.now - self.heard > SILENCE:
            self.world.service.forget(self.wire)
            self.lost(self.wire)
        if self.wire:
            self._retry()
            self.wire.up(self.client.report())
        self.world.after(1.0, lambda: self._beat(life))

    def _stage(self, wire: Wire, pending: client_room.PendingDelta) -> None:
        """Takes a while, if it is a replica's; then the answer goes out on the stream that it came from."""
        life = self.lives
        seconds = self.world.draw.random() if self.kind is ReaderKind.REPLICA and pending.work else 0.0

        def done() -> None:
            if life != self.lives:
                return
            refused = [r for change in pending.work if (r := self._refusal(change))]
            answer = self.client.apply(pending.nonce, refused, self.world.now)
            if answer:
                self.attempts.update((r.tenant, r.channel, r.digest) for r in refused if r.final)
                self.world.counts[type(answer).__name__] += 1
                self._keep(lambda: told(answer))

        def told(answer: FromReader) -> None:
            self.lacking.clear()
            wire.up(answer)

        self.world.after(seconds, done)

    def _keep(self, then: Callable[[], object]) -> None:
        """What is known, onto the disk; then it holds, and what follows is done."""
        self.waiting.append(then)
        if not self.writing:
            self._write()

    def _write(self) -> None:
        life, view, at = self.lives, self.client.state, self.client.state_at
        refused, then, self.waiting = {r.key for r in self.client.refusals}, self.waiting, []
        self.writing = view, refused

        def written() -> None:
            if life != self.lives:
                return
            self.disk, self.refused, self.writing = view, refused, None
            self.client.commit(view, at)
            for act in then:
                act()
            if self.waiting:
                self._write()

        self.world.after(self.world.draw.random() * 0.1, written)

    def _refusal(self, change: Stageable) -> Refusal | None:
        if self.kind is ReaderKind.GATEWAY:
            return None
        for release in change.serving:
            where = (change.tenant, change.key[1], release.digest)
            if release.digest in self.world.history.bad:
                return Refusal(*where, "NON_FINITE", "bad")
            if release.digest not in self.staged and self.world.chance(self.world.dice.fetch_fails):
                return Refusal(*where, "UNAVAILABLE", "no answer", final=False)
        self.staged |= {release.digest for release in change.serving}
        return None

    def _retry(self) -> None:
        for change in self.client.retryable:
            self.client.apply_retry(change, self._refusal(change))
            self._keep(lambda: None)

    # ---- what must be true

    def check(self) -> None:
        view, history = self.client.view, self.world.history
        assert view.position >= self.seen, f"{self.name} went back from {self.seen} to {view.position}"
        self.seen = view.position
        for server in self.world.service.servers.values():
            if self.kind is ReaderKind.GATEWAY and server.hello and server.hello.incarnation == self.client.incarnation:
                assert server.acked <= view.position, "the service takes for applied what isn't"
        assert self.known <= view.channels.keys(), "a channel was forgotten"
        self.known |= view.channels.keys()
        if view.position == Position():
            assert not view.channels
            assert not view.keys
            return
        expected = history.states[view.position]
        refused = self.refused | self.lacking
        for key, channel in view.channels.items():
            if key in expected and key not in refused:
                assert channel == expected[key], f"{self.name} at {view.position}: {channel}, not {expected[key]}"
            assert channel in history.ever[key], "a channel that never was so"
        for key, known in expected.items():
            if isinstance(known, ChannelState):
                assert key in view.channels or key in refused, f"{self.name} at {view.position} lacks {key}"
            elif self.kind is ReaderKind.GATEWAY:
                told = view.tenants if isinstance(known, TenantState) else view.keys
                assert told.get(str(key)) == known, f"{self.name} at {view.position} lacks {key}"
        assert self.kind is ReaderKind.GATEWAY or not (view.keys or view.tenants), "a replica has no use for them"
        assert self.kind is ReaderKind.GATEWAY or self._can_serve(view), "a view with a release that isn't ready"
        for where, count in self.attempts.items():
            assert count <= history.writes[where], f"{where} was tried {count} times"

    def check_caught_up(self) -> None:
        history = self.world.history
        assert self.client.view.position == history.head, f"{self.name}: {self.client.view.position}, {history.head}"
        assert self.client.age(self.world.now) < 2.5
        assert all(refusal.final and refusal.digest in history.bad for refusal in self.client.refusals)
        (server,) = [s for w, s in self.world.service.servers.items() if w is self.wire]
        assert server.acked == history.head
        assert set(server.refusals.values()) == set(self.client.refusals), "the service knows what was refused"

    def _can_serve(self, view: StateView) -> bool:
        return (
            all(
                r.digest in self.staged and r.digest not in self.world.history.bad
                for channel in view.channels.values()
                for r in channel.serving
            )
            if self.staged or not view.channels
            else True
        )
