"""A rank but the first, as a process: `python -m backpack_serving.inference.rank`, with an invitation on its input.

It ends with rank 0, which is who drains: no signal but SIGKILL ends it before.
"""

from __future__ import annotations

import pickle
import signal
import socket
import sys
from contextlib import ExitStack, closing
from pathlib import Path

from backpack_lm.checkpoint import CONFIG, load_part, load_senses, verify
from backpack_lm.config import BackpackConfig
from backpack_lm.cores import set_threads
from backpack_lm.mapped_table import mapped, prepare

from backpack_serving.engine.collectives import RENDEZVOUS_SECONDS, Collectives, PeerLost, join_rendezvous
from backpack_serving.engine.ranks import Link, follow
from backpack_serving.engine.runner import Rank, Runner
from backpack_serving.inference.ranks import LOOPBACK, OTHERS, RANK_0, CannotServe, Invitation, RankPlan


class RankZeroUnreachable(ConnectionError):
    """This rank has no link to rank 0: says where it looked, and why."""


def main() -> None:
    for each in (signal.SIGTERM, signal.SIGINT):  # who stops a service may signal all of its processes
        signal.signal(each, signal.SIG_IGN)
    invitation: Invitation = pickle.load(sys.stdin.buffer)
    try:
        sys.exit(run(invitation, LOOPBACK, invitation.shard.rank))
    except RankZeroUnreachable as error:
        sys.exit(str(error))


def run(invitation: Invitation, host: str, device: int, other_node: bool = False) -> int:
    """Be a rank until rank 0 is gone or wants no more. Returns the exit status: 0, or 1 if it never served.

    `host` is an address of this node at which other ranks reach it, `device` the CUDA device that it computes on if
    rank 0 does on one. With `other_node` this node isn't rank 0's: it has a model folder and a cache of its own.

    Raises RankZeroUnreachable if it can't connect to rank 0, or one of them can't prove to the other who it is.
    """
    with closing(_reach_rank_0(invitation)) as link:
        try:
            try:
                runner = _prepare(link, link.receive(), invitation, host, device, other_node)
            except (EOFError, ConnectionError):
                raise
            except (ValueError, MemoryError, OSError, RuntimeError, PeerLost) as error:
                link.send(CannotServe(str(error) or repr(error)))
                return 1
            link.send(_private_bytes())
            follow(link, runner)
        except (EOFError, OSError, PeerLost):
            return 1  # rank 0 is gone, or says what happened
    return 0


def _reach_rank_0(invitation: Invitation) -> Link:
    """A proven link to rank 0. Raises RankZeroUnreachable."""
    with ExitStack() as stack:
        try:
            address = invitation.host, invitation.port
            link = Link(stack.enter_context(socket.create_connection(address, RENDEZVOUS_SECONDS)))
            link.authenticate(invitation.secret, OTHERS, RANK_0)
            link.send(invitation.shard.rank)
        except (OSError, EOFError) as error:
            raise RankZeroUnreachable(
                f"rank {invitation.shard.rank} can't reach rank 0 at {invitation.host}:{invitation.port}: {error}"
            ) from error
        stack.pop_all()
    return link


def _prepare(link: Link, plan: RankPlan, invitation: Invitation, host: str, index: int, other_node: bool) -> Runner:
    """This rank's runner: reads its part, then meets the others."""
    set_threads(plan.threads)
    device, shard = plan.device_of(index), invitation.shard
    table = _own_table(plan, host) if other_node else plan.table
    config = BackpackConfig.read(plan.folder / CONFIG)
    senses = mapped(table, config, plan.dtype, plan.overlay_rows)
    part = load_part(plan.folder, shard)
    link.send(None)
    store = join_rendezvous(invitation.host, link.receive())
    together = Collectives.join(store, host, shard.rank, plan.ranks, device)
    return plan.runner(Rank(shard, config, together), part, senses, device)


def _own_table(plan: RankPlan, host: str) -> Path:
    """The sense table of this node's own model folder, in this node's cache.

    Raises ValueError if that is another model than rank 0's, or is damaged.
    """
    found = verify(plan.folder).fingerprint
    if found != plan.fingerprint:
        raise ValueError(
            f"{plan.folder} on {host} is another model than on the node of rank 0: its fingerprint is {found[:12]}…, "
            f"not {plan.fingerprint[:12]}…; give every node the same folder"
        )
    return prepare(load_senses(plan.folder), found, plan.dtype)


def _private_bytes() -> int | None:
    """Memory of this process alone, without files that it maps. None where the system doesn't say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    main()
