"""What ranks take of memory while they read a model: their parts of it, and no copies beside them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
from backpack_lm.config import BackpackConfig
from backpack_lm.kernels import Precision
from backpack_serving.engine.ranks import SeveralRanks
from backpack_serving.inference.ranks import LocalRank, LocalRanks, RankPlan, start
from backpack_serving.inference.served_model import ServedModel

from tests.bench.loading import TINY, PartSize, private_memory, write_model

SMALL = BackpackConfig.gpt2(1024, 256, 1024, n_layer=6, n_head=16, num_senses=4)
SLOTS, TOKENS, ROOM, EVERY = 2, 256, 64, 0.005
PYTHON = 24 << 20
"""Bytes by which two processes without a model may differ."""


@contextmanager
def _watched(most: dict[int, int]) -> Iterator[None]:
    """What this process and its children have of private memory at most."""
    this, over = psutil.Process(), threading.Event()

    def watch() -> None:
        looks = 0
        while not over.wait(EVERY):
            if looks % 20 == 0:
                found = (this.pid, *(child.pid for child in this.children()))
            looks += 1
            for number in found:
                most[number] = max(most.get(number, 0), private_memory(number))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_ranks_take_no_more_memory_than_their_parts_while_they_read_them(tmp_path: Path) -> None:
    """Of their own: files that they map aren't in it. By the formula of docs/sizing.md, and a fifth."""
    write_model(TINY, tmp_path / "tiny")
    write_model(SMALL, tmp_path / "small")
    served = [ServedModel.read(tmp_path / name, Precision.INT8, ROOM) for name in ("tiny", "small")]

    def begin(one: ServedModel) -> SeveralRanks:
        assert one.table_file is not None
        source = one.folder, one.manifest.fingerprint, one.table_file, one.storage.dtype
        return start(RankPlan(2, *source, "cpu", 1, SLOTS, ROOM, cache_tokens=TOKENS), one, LocalRanks())

    before, most = private_memory(os.getpid()), dict[int, int]()
    with _watched(most), ThreadPoolExecutor(2) as together:
        executors = list(together.map(begin, served))
    processes = [executor._peers[0].process for executor in executors]
    alone, other = (process.pid for process in processes if isinstance(process, LocalRank))
    for executor in executors:
        executor.close()
    part = PartSize.of(SMALL, 2, Precision.INT8, TOKENS).own
    assert 0.8 * part < most[other] - most[alone] < 1.2 * part + PYTHON
    assert most[os.getpid()] - before < 1.2 * part + 2 * PYTHON, "of rank 0"
