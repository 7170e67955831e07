"""Several ranks on this machine: rank 0 is the replica's process, the others are processes that it starts.

Each rank reads its own part of the weights, and maps the sense table that the replica has prepared. Others end with the
replica, however that ends: their end of a socket says so.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from backpack_lm.int8 import stored_width
from backpack_lm.model import Backpack
from backpack_lm.sharding import Shard, check_ranks
from torch import Tensor

from backpack_serving.engine.collectives import Collectives, PeerLost
from backpack_serving.engine.executor import RankLost
from backpack_serving.engine.ranks import Link, Peer, SeveralRanks
from backpack_serving.engine.runner import Rank, Runner
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.settings import Settings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What every rank of a replica is started with. `table` is the file of the whole sense table, in `dtype`."""

    ranks: int
    folder: Path
    table: Path
    dtype: torch.dtype
    device: str
    threads: int
    slots: int
    overlay_rows: int
    context: int = 0
    cache_tokens: int = 0

    def device_of(self, rank: int) -> torch.device:
        """Ranks on CUDA devices have one each. Raises ValueError if there are too few."""
        if self.device == "cpu":
            return torch.device("cpu")
        if self.ranks > (found := torch.cuda.device_count()):
            raise ValueError(f"ranks is {self.ranks}, one for each CUDA device, and torch finds {found}")
        return torch.device(self.device, rank)

    def runner(self, rank: Rank, part: Backpack, table: Tensor) -> Runner:
        """The runner of a rank's part, over the mapped table [V·k + R, d]. On a CUDA device it copies its own senses of
        it there."""
        device = self.device_of(rank.shard.rank)
        if device.type != "cpu":
            torch.cuda.set_device(device)
            table = _own_senses(table, rank).to(device)
        return Runner(part, table, self.slots, context=self.context, cache_tokens=self.cache_tokens, rank=rank)


def plan_of(settings: Settings, served: ServedModel, device: str, threads: int) -> RankPlan:
    """The plan of a replica. Raises ValueError if its sense table can't be mapped by others."""
    if served.table_file is None:
        raise ValueError("ranks need the sense table as a file in the cache folder; the log says why there is none")
    return RankPlan(
        settings.ranks,
        served.folder,
        served.table_file,
        served.storage.dtype,
        device,
        threads,
        settings.slots,
        settings.overlay_rows,
        settings.context,
        settings.cache_tokens,
    )


def start(plan: RankPlan, served: ServedModel) -> SeveralRanks:
    """Start the other ranks of a served model, and be rank 0, which has read it already.

    Blocks until all are ready. Raises ConfigError if so many ranks can't share the model, ValueError if there isn't a
    device for each, RankLost if one ends before it is ready.
    """
    model = served.model
    check_ranks(model.config, plan.ranks)
    device = plan.device_of(0)
    peers: list[Peer] = []
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="backpack-ranks-") as folder:
        for number in range(1, plan.ranks):
            peers.append(_started(Shard(number, plan.ranks)))
            stack.callback(peers[-1].close)
        store = Path(folder) / "store"
        for peer in peers:
            with _reporting(peer):
                peer.link.receive()  # it has imported what it needs
                peer.link.send((plan, peer.shard, store))
        shard = Shard(0, plan.ranks)
        try:
            together = Collectives.join(store, 0, plan.ranks, device)
        except PeerLost as error:
            raise RankLost(f"{_endings(peers) or 'a rank is lost'} before it was ready: {error}") from None
        rank = Rank(shard, model.config, together)
        runner = plan.runner(rank, shard.part(model.config, model.state_dict().__getitem__), served.storage)
        for peer in peers:
            with _reporting(peer):
                log.info("rank is ready", rank=peer.shard.rank, private_bytes=peer.link.receive())
        stack.pop_all()
    return SeveralRanks(runner, rank, peers)


def _started(shard: Shard) -> Peer:
    ours, theirs = socket.socketpair()
    with theirs:
        number = theirs.fileno()
        command = [sys.executable, "-m", "backpack_serving.inference.rank", str(number)]
        # A session of its own: Ctrl-C in a terminal is for rank 0 to decide on.
        process = subprocess.Popen(command, pass_fds=[number], stdin=subprocess.DEVNULL, start_new_session=True)
    return Peer(shard, process, Link(ours))


def _endings(peers: list[Peer]) -> str:
    """The ranks whose processes have ended, and how."""
    return ", ".join(f"rank {peer.shard.rank} {how}" for peer in peers if (how := peer.ended()))


@contextmanager
def _reporting(peer: Peer) -> Iterator[None]:
    """Raises RankLost, saying how the process ended, if it is gone."""
    try:
        yield
    except (EOFError, OSError):
        raise RankLost(
            f"rank {peer.shard.rank} {peer.ended() or 'closed its connection'} before it was ready"
        ) from None


def _own_senses(table: Tensor, rank: Rank) -> Tensor:
    """A rank's senses of a table [V·k + R, d], with the same room behind them: [V·k/n + R, d]."""
    config, senses = rank.whole, rank.shard.senses(rank.whole)
    own = table[: config.vocab_size * config.num_senses].view(config.vocab_size, config.num_senses, -1)
    rows = own[:, senses.start : senses.stop].flatten(0, 1)
    room = len(table) - config.vocab_size * config.num_senses
    return torch.cat([rows, rows.new_zeros(room, stored_width(config.n_embd, table.dtype))])
