"""Several ranks of one model: rank 0 is the replica's process, the others are processes that it has started.

Each rank reads its own part of the weights and maps the sense table, from files of its own node. They reach rank 0 at
an address of its node, and say by a secret that they are its own; they end with it, however it ends.
"""

from __future__ import annotations

import pickle
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeVar

import structlog
import torch
from backpack_lm.int8 import stored_width
from backpack_lm.model import Backpack
from backpack_lm.sharding import Shard, check_ranks
from torch import Tensor

from backpack_serving.engine.collectives import Collectives, PeerLost, open_rendezvous
from backpack_serving.engine.executor import RankLost
from backpack_serving.engine.ranks import ENDING, HANDSHAKE, PAUSE, Link, Peer, RankProcess, SeveralRanks
from backpack_serving.engine.runner import Rank, Runner
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.settings import Settings

T = TypeVar("T")

log = structlog.get_logger(__name__)

LOOPBACK = "127.0.0.1"

RANK_0, OTHERS = b"rank 0", b"another rank"
"""Names of the two ends of a link, for `Link.authenticate`."""


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What every rank of a replica is started with. `table` is the file of the whole sense table, in `dtype`, on the
    node of rank 0."""

    ranks: int
    folder: Path
    fingerprint: str
    table: Path
    dtype: torch.dtype
    device: str
    threads: int
    slots: int
    overlay_rows: int
    context: int = 0
    cache_tokens: int = 0

    def device_of(self, index: int) -> torch.device:
        """The CPU, or a CUDA device by its number among those that a rank sees. Raises ValueError if it isn't there."""
        if self.device == "cpu":
            return torch.device("cpu")
        if index >= (found := torch.cuda.device_count()):
            raise ValueError(
                f"CUDA devices that torch finds: {found}; each of the {self.ranks} ranks (`ranks`, under Ray "
                f"`tensor_parallel`) computes on its own, this one on number {index}"
            )
        return torch.device(self.device, index)

    def runner(self, rank: Rank, part: Backpack, table: Tensor, device: torch.device) -> Runner:
        """The runner of a rank's part, over the mapped table [V·k + R, d]. On a CUDA device it copies its own senses of
        it there."""
        if device.type != "cpu":
            torch.cuda.set_device(device)
            table = _own_senses(table, rank).to(device)
        return Runner(part, table, self.slots, context=self.context, cache_tokens=self.cache_tokens, rank=rank)


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a rank needs to find rank 0: where it listens, and the secret by which both know each other."""

    host: str
    port: int
    shard: Shard
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class CannotServe:
    """A rank's last message if it can't be one: why."""

    why: str


class Launcher(Protocol):
    """How the ranks but the first are started. `host` is the address at which they reach this process."""

    host: str

    def start(self, invitation: Invitation) -> RankProcess:
        """Start `rank.run` with an invitation, as a process."""


class LocalRanks:
    """Ranks as processes of this machine."""

    host = LOOPBACK

    def start(self, invitation: Invitation) -> LocalRank:
        command = [sys.executable, "-m", "backpack_serving.inference.rank"]
        # A session of its own: Ctrl-C in a terminal is for rank 0 to decide on.
        process = LocalRank(command, stdin=subprocess.PIPE, start_new_session=True)
        assert process.stdin
        with suppress(BrokenPipeError), process.stdin:  # if it is gone, that is noticed where it is waited for
            process.stdin.write(pickle.dumps(invitation))
        return process


class LocalRank(subprocess.Popen[bytes]):
    """A rank that this process has started."""

    def ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            return f"ended with status {self.wait(PAUSE)}"
        return ""

    def end(self) -> None:
        try:
            self.wait(ENDING)
        except subprocess.TimeoutExpired:  # stopped, perhaps
            self.kill()
            self.wait()


def plan_of(settings: Settings, served: ServedModel, device: str, threads: int) -> RankPlan:
    """The plan of a replica. Raises ValueError if its sense table can't be mapped by others."""
    if served.table_file is None:
        raise ValueError("ranks need the sense table as a file in the cache folder; the log says why there is none")
    return RankPlan(
        settings.ranks,
        served.folder,
        served.manifest.fingerprint,
        served.table_file,
        served.storage.dtype,
        device,
        threads,
        settings.slots,
        settings.overlay_rows,
        settings.context,
        settings.cache_tokens,
    )


def start(plan: RankPlan, served: ServedModel, launcher: Launcher) -> SeveralRanks:
    """Start the other ranks of a served model, and be rank 0, which has read it already.

    Blocks until all are ready. Raises ConfigError if so many ranks can't share the model, ValueError if there isn't a
    device, OSError if `launcher.host` is no address of this machine, RankLost as soon as one ends or says that it can't
    serve.
    """
    model, shard = served.model, Shard(0, plan.ranks)
    check_ranks(model.config, plan.ranks)
    device = plan.device_of(0)
    with ExitStack() as stack:
        with socket.create_server((launcher.host, 0)) as listener:
            port, secret = listener.getsockname()[1], secrets.token_bytes(32)
            processes: dict[int, RankProcess] = {}
            for number in range(1, plan.ranks):
                processes[number] = launcher.start(Invitation(launcher.host, port, Shard(number, plan.ranks), secret))
                stack.callback(processes[number].end)
            links = _accept_all(listener, secret, processes)
        peers = [Peer(Shard(number, plan.ranks), processes[number], links[number]) for number in processes]
        for peer in peers:
            stack.callback(peer.link.close)  # before its process is ended, which then ends by itself
            _send_to(peer, plan)
        _receive_from_all(peers)  # each has read its part
        store, port = open_rendezvous(launcher.host)
        for peer in peers:
            _send_to(peer, port)
        together = _while_all_run(peers, lambda: Collectives.join(store, launcher.host, 0, plan.ranks, device))
        rank = Rank(shard, model.config, together)
        part = shard.part(model.config, model.state_dict().__getitem__)
        runner = plan.runner(rank, part, served.storage, device)
        for number, private in _receive_from_all(peers).items():
            log.info("rank is ready", rank=number, private_bytes=private)
        stack.pop_all()
    return SeveralRanks(runner, rank, peers)


def _accept_all(listener: socket.socket, secret: bytes, processes: Mapping[int, RankProcess]) -> dict[int, Link]:
    """The links of all ranks, by rank. Raises RankLost as soon as a process ends. Strangers are turned away.

    Each connection has a thread for its handshake, so that one which sends nothing delays no other.
    """
    links: dict[int, Link] = {}
    listener.settimeout(PAUSE)
    look_at = 0.0
    try:
        while len(links) < len(processes):
            with suppress(TimeoutError):
                connection, (host, *_) = listener.accept()
                Thread(target=_admit, args=(connection, host, secret, links), name="handshake", daemon=True).start()
            if time.monotonic() < look_at:
                continue
            for number, process in processes.items():
                if how := process.ended():
                    raise RankLost(f"rank {number} {how} before it was ready")
            look_at = time.monotonic() + PAUSE
    except BaseException:
        for link in list(links.values()):  # tells their processes to end
            link.close()
        raise
    return links


def _admit(connection: socket.socket, host: str, secret: bytes, links: dict[int, Link]) -> None:
    """Add a connection to the links if the rank at its other end proves that it knows the secret."""
    try:
        link = Link(connection)
        link.authenticate(secret, RANK_0, OTHERS)
        links[link.receive(HANDSHAKE)] = link
    except (OSError, EOFError) as error:
        log.warning("who isn't a rank of this replica was turned away", host=host, error=str(error))
        connection.close()


def _send_to(peer: Peer, message: object) -> None:
    try:
        peer.link.send(message)
    except OSError as error:
        raise _why_lost(peer) or RankLost(f"rank {peer.shard.rank} is lost: {error}") from None


def _receive_from_all(peers: list[Peer]) -> dict[int, Any]:
    """The next message of each rank. Raises RankLost as soon as one is gone, or says that it can't serve."""
    heard: dict[int, Any] = {}
    while len(heard) < len(peers):
        for peer in peers:
            if peer.shard.rank not in heard and peer.link.is_readable():
                heard[peer.shard.rank] = _receive_from(peer)
            elif lost := _why_lost(peer):
                raise lost
    return heard


def _while_all_run(peers: list[Peer], work: Callable[[], T]) -> T:
    """The result of what is done together with the others. Raises RankLost as soon as one of them is gone: the work
    would wait for it, and is left alone."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, name="ranks meet", daemon=True).start()
    while not done.done():
        for peer in peers:
            if lost := _why_lost(peer):
                raise lost
    try:
        return done.result()
    except PeerLost as error:
        raise next(filter(None, map(_why_lost, peers)), RankLost(f"ranks don't meet: {error}")) from None


def _receive_from(peer: Peer) -> Any:
    """The next message of a rank that isn't ready. Raises RankLost if there is none, or it is that it can't serve."""
    try:
        message = peer.link.receive()
    except (EOFError, OSError) as error:
        raise RankLost(f"rank {peer.shard.rank} {peer.ended() or f'is lost ({error})'} before it was ready") from None
    if isinstance(message, CannotServe):
        raise RankLost(f"rank {peer.shard.rank} can't serve: {message.why}")
    return message


def _why_lost(peer: Peer) -> RankLost | None:
    """What became of a rank that isn't ready: what it said last, else how its process ended. None if it runs."""
    if not (how := peer.ended()):
        return None
    try:
        while peer.link.is_readable():
            _receive_from(peer)
    except RankLost as lost:
        return lost
    return RankLost(f"rank {peer.shard.rank} {how} before it was ready")


def _own_senses(table: Tensor, rank: Rank) -> Tensor:
    """A rank's senses of a table [V·k + R, d], with the same room behind them: [V·k/n + R, d]."""
    config, senses = rank.whole, rank.shard.senses(rank.whole)
    own = table[: config.vocab_size * config.num_senses].view(config.vocab_size, config.num_senses, -1)
    rows = own[:, senses.start : senses.stop].flatten(0, 1)
    room = len(table) - config.vocab_size * config.num_senses
    return torch.cat([rows, rows.new_zeros(room, stored_width(config.n_embd, table.dtype))])
