"""A decode step of one rank, of two and of four on this machine, and what collectives move in it.

Backpack-Small's shape with random weights and a finished table. Ranks have one thread each: where there are fewer cores
than ranks, they take turns. Where others work on the machine, more ranks get more of it: processor time, of all ranks
together, says what they cost.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from backpack_lm.checkpoint import save
from backpack_lm.config import SMALL, StoredSenses
from backpack_lm.installed import folder_of
from backpack_lm.kernels import Precision
from backpack_lm.kernels.trunk import CachedTrunk
from backpack_lm.manifest import TOKENIZER
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay
from backpack_lm.patch import ReleaseContent
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.executor import Executor
from backpack_serving.engine.ranks import SeveralRanks
from backpack_serving.engine.runner import Runner
from backpack_serving.engine.scheduler import Scheduler
from backpack_serving.engine.sequence import GenerationRequest
from backpack_serving.engine.slots import OverlayRows, Slots
from backpack_serving.inference.ranks import LocalRank, LocalRanks, RankPlan, start
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.sampling import SamplingParams

from tests.bench.report import console, spread, write

BATCHES, RANKS, LENGTH, ROOM = (1, 8, 32), (2, 4), 64, 1024
ROUNDS, STEPS = 8, 6


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to compute a step, and how long its start took in seconds."""

    name: str
    executor: Executor
    started: float = 0.0


def _random(folder: Path) -> None:
    torch.manual_seed(0)
    model = Backpack(replace(SMALL, senses=StoredSenses.BFLOAT16)).eval().requires_grad_(False)
    for part in model.sense_rows:
        part.rows.copy_(torch.randn(part.rows.shape) * 0.1)
    save(model, folder_of("micro") / TOKENIZER, folder)


@contextmanager
def _ways(folder: Path, slots: int) -> Iterator[tuple[ServedModel, list[_Way]]]:
    served = ServedModel.read(folder, Precision.AUTO, ROOM)
    assert served.table_file is not None
    by_operation = Runner(served.model, served.storage, slots)
    by_operation._trunk = CachedTrunk(by_operation.kernels, served.model)
    found = [
        _Way("1", Runner(served.model, served.storage, slots)),
        _Way("1, operation by operation", by_operation),
    ]
    with ExitStack() as stack:
        for ranks in RANKS:
            began = time.perf_counter()
            fingerprint, dtype = served.manifest.fingerprint, served.storage.dtype
            plan = RankPlan(ranks, folder, fingerprint, served.table_file, dtype, "cpu", 1, slots, ROOM)
            executor = start(plan, served, LocalRanks())
            stack.callback(executor.close)
            found.append(_Way(str(ranks), executor, time.perf_counter() - began))
        yield served, found


def _decoding(way: _Way, overlay: Overlay, batch: int, vocabulary: int) -> Engine:
    """An engine whose sequences have been read, and decode."""
    engine = Engine(way.executor, Slots(batch), OverlayRows(ROOM), Scheduler(batch * LENGTH, batch))
    new = 2 + ROUNDS * STEPS
    for n in range(batch):
        prompt = tuple((n * 7919 + at * 104_729) % vocabulary for at in range(LENGTH))
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_end_of_text=True)
        engine.add(GenerationRequest(f"r{n}", str(n), prompt, sampling, overlay))
    engine.step()
    engine.step()
    return engine


def main() -> None:
    argparse.ArgumentParser(prog="python -m tests.bench.ranks", description=__doc__).parse_args()
    torch.set_num_threads(1)
    rows, data = [], {}
    with tempfile.TemporaryDirectory() as folder:
        _random(Path(folder))
        with _ways(Path(folder), max(BATCHES)) as (served, ways):
            overlay = Overlay.compile(ReleaseContent(), served.table)
            for batch in BATCHES:
                engines = [_decoding(way, overlay, batch, served.model.config.tokens) for way in ways]
                moved = [dict(_bytes(way.executor)) for way in ways]
                times: list[list[float]] = [[] for _ in ways]
                worked = [0.0 for _ in ways]
                for _ in range(ROUNDS):  # in turn: other work on this machine meets all alike
                    for n, (engine, own) in enumerate(zip(engines, times, strict=True)):
                        before_it = _processor_seconds(ways[n].executor)
                        for _ in range(STEPS):
                            began = time.perf_counter()
                            engine.step()
                            own.append(time.perf_counter() - began)
                        worked[n] += _processor_seconds(ways[n].executor) - before_it
                for way, before, own, cpu in zip(ways, moved, times, worked, strict=True):
                    step = spread([seconds * 1e3 for seconds in own])
                    bytes_ = {
                        name: (count - before.get(name, 0)) // len(own) for name, count in _bytes(way.executor).items()
                    }
                    data[f"{way.name}, batch {batch}"] = {
                        "step_ms": step,
                        "processor_ms": cpu * 1e3 / len(own),
                        "bytes": bytes_,
                        "start_s": way.started,
                    }
                    rows.append(
                        [
                            way.name,
                            str(batch),
                            f"{step['median']:.1f} ({step['q1']:.1f}–{step['q3']:.1f})",
                            f"{cpu * 1e3 / len(own):.0f}",
                            f"{bytes_.get('sum', 0):,}",
                            f"{bytes_.get('logits', 0):,}",
                            f"{way.started:.1f}" if way.started else "",
                        ]
                    )
                    console.print(" | ".join(rows[-1]), markup=False)
    write(
        "ranks",
        f"A decode step on ranks of one machine (Backpack-Small's shape, {LENGTH} tokens, a thread a rank)",
        "python -m tests.bench.ranks",
        [
            "ranks",
            "batch",
            "a step, ms (q1–q3)",
            "processor time, ms",
            "rank 0 receives for sums, bytes",
            "for logits, bytes",
            "start, s",
        ],
        rows,
        data,
    )


def _processor_seconds(executor: Executor) -> float:
    """Of this process, and of the other ranks."""
    peers = executor._peers if isinstance(executor, SeveralRanks) else []
    others = [peer.process.pid for peer in peers if isinstance(peer.process, LocalRank)]
    times = [psutil.Process(pid).cpu_times() for pid in others]
    return time.process_time() + sum(each.user + each.system for each in times)


def _bytes(executor: Executor) -> dict[str, int]:
    return executor.runner._rank.collectives.bytes if isinstance(executor, SeveralRanks) else {}


if __name__ == "__main__":
    main()
