"""A rank but the first, as a process: `python -m backpack_serving.inference.rank FD`, with a socket to rank 0.

It ends with rank 0, which is who drains: no signal but SIGKILL ends it before.
"""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

from backpack_lm.checkpoint import CONFIG, load_part
from backpack_lm.config import BackpackConfig
from backpack_lm.cores import set_threads
from backpack_lm.mapped_table import mapped

from backpack_serving.engine.collectives import Collectives, PeerLost
from backpack_serving.engine.ranks import Link, follow
from backpack_serving.engine.runner import Rank


def main(connection: int) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):  # who stops a service may signal all of its processes
        signal.signal(each, signal.SIG_IGN)
    link = Link(socket.socket(fileno=connection))
    try:
        link.send(None)
        plan, shard, store = link.receive()
        set_threads(plan.threads)
        together = Collectives.join(store, shard.rank, plan.ranks, plan.device_of(shard.rank))
        config = BackpackConfig.read(plan.folder / CONFIG)
        table = mapped(plan.table, config, plan.dtype, plan.overlay_rows)
        runner = plan.runner(Rank(shard, config, together), load_part(plan.folder, shard), table)
        link.send(_private_bytes())
        follow(link, runner)
    except (EOFError, ConnectionError, PeerLost):
        sys.exit(1)  # rank 0 is gone, or says what happened


def _private_bytes() -> int | None:
    """Memory of this process alone, without files that it maps. None where the system doesn't say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    main(int(sys.argv[1]))
