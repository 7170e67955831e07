"""What the ranks of a replica do together in a step. The only file that names a collective.

Parts are gathered and added up in the order of ranks, not reduced: a reduction's order of additions depends on where
in a message a number stands, and so on what else is in the batch.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

HUNG = 1.2
"""Seconds after which a rank that others wait for counts as hung. Every rank computes as much as the others between
two collectives, so waits are a few milliseconds."""


RENDEZVOUS_SECONDS = 60.0
"""Seconds that ranks may take to find each other."""


class PeerLost(Exception):
    """Another rank ended or hung in a collective."""


def open_rendezvous(host: str) -> tuple[Any, int]:
    """Where ranks meet: a store in this process, which listens on one address of its node, and its port."""
    listener = socket.create_server((host, 0))
    port: int = listener.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        is_master=True,
        master_listen_fd=listener.detach(),
        wait_for_workers=False,
        timeout=timedelta(seconds=RENDEZVOUS_SECONDS),
    )
    return store, port


def join_rendezvous(host: str, port: int) -> Any:
    """The store that rank 0 has opened. Raises PeerLost."""
    with _lost():
        return dist.TCPStore(host, port, timeout=timedelta(seconds=RENDEZVOUS_SECONDS))  # type: ignore[attr-defined]


class Collectives:
    """One rank's side of them. Every rank calls the same ones in the same order, with parts of the same shapes.

    `bytes` counts what this rank has received from the others, by collective.
    """

    def __init__(self, group: Any, rank: int, ranks: int) -> None:
        self._group, self.rank, self.ranks = group, rank, ranks
        self.bytes: dict[str, int] = {"sum": 0, "logits": 0}
        self.calls: dict[str, int] = {"sum": 0, "logits": 0}

    @classmethod
    def join(cls, store: Any, host: str, rank: int, ranks: int, device: torch.device) -> Collectives:
        """Meet the other ranks, who are all about to call this, by a store: NCCL if they compute on CUDA devices, which
        has never run, else gloo, which listens on `host`, an address of this rank's node. Nobody needs the store
        afterwards.

        Raises PeerLost.
        """
        with _lost():
            if device.type == "cuda":
                nccl = dist.ProcessGroupNCCL.Options()
                nccl._timeout = timedelta(seconds=RENDEZVOUS_SECONDS)
                group: Any = dist.ProcessGroupNCCL(store, rank, ranks, nccl)
            else:
                gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
                gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
                gloo._timeout = timedelta(seconds=RENDEZVOUS_SECONDS)
                group = dist.ProcessGroupGloo(store, rank, ranks, gloo)
            # NCCL connects ranks in their first collective, by the store: now, with the time that this may take.
            part = torch.ones(1, device=device)
            parts = [torch.empty_like(part) for _ in range(ranks)]
            group.allgather([parts], [part]).wait()
            torch.cat(parts).tolist()  # a CUDA device has done it, too
        group._set_default_timeout(timedelta(seconds=HUNG))
        return cls(group, rank, ranks)

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, any shape, at every rank: added up in float32, in the order of ranks."""
        parts = [torch.empty_like(part) for _ in range(self.ranks)]
        self._count_bytes("sum", part)
        self._wait(lambda: self._group.allgather([parts], [part.contiguous()]))
        total = parts[0].float()
        for other in parts[1:]:
            total = total + other
        return total.to(part.dtype)

    def gather_logits(self, part: Tensor, tokens: int) -> Tensor:
        """All ranks' logits, beside each other in the order of ranks: [B, tokens] at rank 0, [0, tokens] at others.

        `part` are a rank's own. Those of the last ranks may be fewer.
        """
        width = -(-tokens // self.ranks)
        part = F.pad(part, (0, width - part.shape[1])).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.ranks)] if self.rank == 0 else []
        if self.rank == 0:
            self._count_bytes("logits", part)
        self._wait(lambda: self._group.gather([parts] if parts else [], [part], dist.GatherOptions()))
        return torch.cat(parts, 1)[:, :tokens].contiguous() if parts else part.new_empty(0, tokens)

    def _count_bytes(self, what: str, part: Tensor) -> None:
        self.calls[what] += 1
        self.bytes[what] += part.nbytes * (self.ranks - 1)

    def _wait(self, begin: Callable[[], Any]) -> None:
        with _lost():
            begin().wait()


@contextmanager
def _lost() -> Iterator[None]:
    """What torch raises when a peer is gone, or late, is PeerLost here."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error).partition("This is typically")[0].strip()) from None
