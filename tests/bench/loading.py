"""The start of a replica on ranks of this machine, and how much memory of its own each rank takes for it.

    python -m tests.bench.loading [--shape 1.4b] [--ranks N] [--precision P …]

The model has random weights, and lies in a folder of a temporary folder (TMPDIR): nobody ever holds all of it, as its
layers are alike. `backpack serve inference` is started on it twice: the first start puts the sense table into the
host's cache, the second finds it there. Every 20 ms each rank's private memory (RssAnon) is read: files that are mapped
aren't in it. A replica of a tiny model, started before, says what Python and torch take by themselves.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from backpack_lm import cache, checkpoint
from backpack_lm.config import BackpackConfig, StoredSenses
from backpack_lm.installed import folder_of
from backpack_lm.kernels import Precision
from backpack_lm.manifest import TOKENIZER, Manifest
from backpack_lm.model import Backpack, shapes_alone
from torch import Tensor

from tests.bench.report import console, write
from tests.bench.sizing import MODELS
from tests.e2e.starts import Started

SHAPES = {"1.4b": MODELS["1.4 B"]}
TINY = BackpackConfig.gpt2(256, 64, 64, n_layer=1, n_head=4, num_senses=4)
SLOTS, CACHE_TOKENS, ROOM = 4, 1024, 1024
EVERY = 0.02
"""Seconds between two looks at the memory of all ranks."""

LOOK = 0.5
"""Seconds between two looks which processes are ranks."""

PRECISIONS = ("float32", "bfloat16", "int8")


def write_model(config: BackpackConfig, folder: Path) -> Manifest:
    """A model folder with random weights and a finished table in bfloat16, all of whose layers are alike."""
    torch.manual_seed(0)
    with shapes_alone():
        model = Backpack(replace(config, senses=StoredSenses.BFLOAT16)).eval().requires_grad_(False)
    made: dict[tuple[str, torch.Size], Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, empty in model.state_dict().items():
        alike = ".".join(part for part in name.split(".") if not part.isdigit()), empty.shape
        if alike not in made:
            values = torch.randn(empty.shape, dtype=empty.dtype).mul_(0.02)
            made[alike] = values if empty.ndim > 1 else values.add_(1.0)
        state[name] = made[alike]
    model.load_state_dict(state, assign=True)
    folder.mkdir()
    return checkpoint.write(model, folder_of("micro") / TOKENIZER, folder)


@dataclass(frozen=True, slots=True)
class PartSize:
    """Bytes of a rank's part by docs/sizing.md: its `own` memory, and what it maps of files."""

    own: int
    mapped: int

    @classmethod
    def of(cls, config: BackpackConfig, ranks: int, precision: str, tokens: int) -> PartSize:
        """With caches of so many positions."""
        layer, d, V, k = config.trunk.layer, config.n_embd, config.vocab_size, config.num_senses
        width = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 64}[precision]
        fast = Precision.AUTO.dtype() is torch.bfloat16  # what caches are in beside int8
        cached = 2 if precision == "bfloat16" or (precision == "int8" and fast) else 4
        heads, groups = layer.heads // ranks, max(1, layer.kv_heads // ranks)
        inner, depth, senses = layer.inner / ranks, config.trunk.depth, k // ranks * config.sense_head_width
        matrices = depth * d * (layer.head_width * (2 * heads + 2 * groups) + (3 if layer.gated else 2) * inner)
        weights = width * (matrices + 2 * senses * d + V * d / ranks)
        caches = cached * tokens * (2 * depth * groups * layer.head_width + senses)
        embedding = 0 if cached == 4 else cached * V * d
        return cls(round(weights + caches + embedding), round(width * V * d * k / ranks + 4 * V * d))


@dataclass(frozen=True, slots=True)
class MeasuredStart:
    """Seconds of a start, and bytes of each rank's private memory: at most until then, and then."""

    seconds: float
    most: list[int]
    ready: list[int]


def start(folder: Path, state: Path, ranks: int, precision: str, **settings: str) -> MeasuredStart:
    """Start a replica, look at its ranks until it serves, and end it."""
    state.mkdir(exist_ok=True)
    began = time.monotonic()
    started = Started(
        state, "serve", "inference", MODEL=str(folder), RANKS=str(ranks), PRECISION=precision, THREADS="1",
        INFERENCE_ADDRESS="127.0.0.1:0", SERVICE_KEY="bp_none_none", SLOTS=str(SLOTS), CACHE_TOKENS=str(CACHE_TOKENS),
        OVERLAY_ROWS=str(ROOM), **settings,
    )  # fmt: skip
    process, most = psutil.Process(started.process.pid), dict[int, int]()
    ranks_now: list[int] = []
    look = 0.0
    try:
        while "serves on" not in started.said:
            if started.process.poll() is not None:
                raise RuntimeError(started.said)
            if time.monotonic() > look:  # which processes there are takes longer to find out than what they have
                ranks_now, look = list(_ranks_of(process)), time.monotonic() + LOOK
            for each in ranks_now:
                most[each] = max(most.get(each, 0), private_memory(each))
            time.sleep(EVERY)
        seconds = time.monotonic() - began
        ready = [private_memory(each) for each in _ranks_of(process)]
        return MeasuredStart(seconds, list(most.values()), ready)
    finally:
        started.process.kill()
        started.process.wait()


def _ranks_of(process: psutil.Process) -> Iterator[int]:
    """Rank 0, and those that it has started, in order."""
    yield process.pid
    yield from sorted(child.pid for child in process.children() if "backpack_serving.inference.rank" in child.cmdline())


def private_memory(number: int) -> int:
    """Bytes of a process's memory that aren't of files; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{number}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def main() -> None:
    options = argparse.ArgumentParser(
        prog="python -m tests.bench.loading", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--shape", choices=SHAPES, default="1.4b")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    chosen = options.parse_args()
    rows, data = [], {}
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        write_model(TINY, where / "tiny")
        began = time.monotonic()
        manifest = write_model(SHAPES[chosen.shape], where / "model")
        console.print(f"the model is written: {time.monotonic() - began:.0f} s")
        for precision in chosen.precision:
            alone = start(where / "tiny", where / "state", chosen.ranks, precision)
            part = PartSize.of(manifest.config, chosen.ranks, precision, CACHE_TOKENS)
            try:
                for which in ("first", "second"):
                    found = start(where / "model", where / "state", chosen.ranks, precision)
                    told = {"part": asdict(part), "alone": asdict(alone), "start": asdict(found)}
                    data[f"{precision}, {which}"] = told
                    for rank, (most, ready) in enumerate(zip(found.most, found.ready, strict=True)):
                        own, base = part.own, alone.ready[rank]
                        rows.append(
                            [
                                precision,
                                which,
                                str(rank),
                                f"{found.seconds:.1f}",
                                *(f"{size / 1e9:.2f}" for size in (part.mapped, own, base, most, ready)),
                                f"{(most - base) / own:.2f}",
                                f"{(most - base) / (own + part.mapped):.2f}",
                            ]
                        )
                        console.print(" | ".join(rows[-1]), markup=False)
            finally:
                for file in cache.folder("tables").glob(f"{manifest.fingerprint[:32]}*"):
                    file.unlink()
        shutil.rmtree(where / "model")
    write(
        "loading",
        f"The start of a replica of a {chosen.shape} Backpack on {chosen.ranks} ranks, a thread each",
        "python -m tests.bench.loading",
        [
            "precision",
            "start",
            "rank",
            "seconds",
            "its part: mapped, GB",
            "its own, GB",
            "Python and torch, GB",
            "private at most, GB",
            "when ready, GB",
            "most / own part",
            "most / whole part",
        ],
        rows,
        data,
    )


if __name__ == "__main__":
    main()
