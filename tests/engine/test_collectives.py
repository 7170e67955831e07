"""Ranks meet, and what they do together there."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from backpack_serving.engine import collectives
from backpack_serving.engine.collectives import Collectives, PeerLost
from backpack_serving.inference import ranks


def test_joining_ends_with_a_collective_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL meets in the first collective: it needs the store, and more time than a step's collective has."""
    monkeypatch.setattr(collectives, "HUNG", 0.3)
    late = 0.6
    store, port = collectives.open_rendezvous(ranks.LOOPBACK)

    def join_late() -> float:
        """Rank 1, which is in the group at once and in the first collective later."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=ranks.LOOPBACK)]
        options._timeout = timedelta(seconds=5)
        group = dist.ProcessGroupGloo(collectives.join_rendezvous(ranks.LOOPBACK, port), 1, 2, options)
        time.sleep(late)
        for _ in range(2):
            group.allgather([[torch.empty(1), torch.empty(1)]], [torch.ones(1)]).wait()
        return time.monotonic()

    with ThreadPoolExecutor(1) as other:
        since, their_end = time.monotonic(), other.submit(join_late)
        together = Collectives.join(store, ranks.LOOPBACK, 0, 2, torch.device("cpu"))
        assert time.monotonic() - since >= late
        assert together.sum(torch.full((1,), 2.0)).tolist() == [3.0]
        assert their_end.result(10)
        with pytest.raises(PeerLost):
            together.sum(torch.ones(1))  # which waits for as long as a step's does


def test_ranks_meet_at_one_address_of_a_node() -> None:
    _, port = collectives.open_rendezvous("127.0.0.1")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 5)
    socket.create_connection(("127.0.0.1", port), 5).close()
