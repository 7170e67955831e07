"""How long a search for senses takes: one pass over a whole sense table, first and repeated.

python -m tests.bench.find    the model that is served by default, if it is installed; GPT-2's vocabulary, random

Measured is what a replica computes for a page of 20, on two threads, by the clock. A table lies in a file that is
mapped, as a replica has it; the first search touches its pages for the first time in this process.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from backpack_lm.config import SMALL
from backpack_lm.installed import folder_of
from backpack_lm.int8 import store, stored_width
from backpack_lm.kernels import Precision
from backpack_lm.manifest import NAME as MANIFEST
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import ReleaseContent
from backpack_lm.sense_search import CellSearch
from backpack_serving.inference.served_model import ServedModel

from tests.bench.report import console, spread, write

THREADS, ROUNDS, CHUNK = 2, 10, 1024
DTYPES = (torch.bfloat16, torch.int8)


def mapped_at_random(file: Path, dtype: torch.dtype) -> torch.Tensor:
    """Random sense vectors of GPT-2's vocabulary, in a file, [V, k, d] as stored."""
    shape = SMALL.vocab_size, SMALL.num_senses, stored_width(SMALL.n_embd, dtype)
    with file.open("wb") as out:
        for part in torch.arange(SMALL.vocab_size).split(CHUNK):
            vectors = store(torch.randn(len(part), SMALL.num_senses, SMALL.n_embd), dtype)
            out.write(vectors.contiguous().view(torch.uint8).numpy().data)
    return torch.from_file(str(file), shared=False, size=math.prod(shape), dtype=dtype).view(shape)


def searching(model: Backpack, table: SenseTable) -> Callable[[], object]:
    overlay = Overlay.compile(ReleaseContent(), table)
    return lambda: CellSearch(model, table, overlay, [1000, 2000], [3000]).cells(0, 20)


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    rows, data = [], {}

    def measure(name: str, search: Callable[[], object]) -> None:
        times = []
        for _ in range(ROUNDS + 1):
            started = time.perf_counter()
            search()
            times.append(time.perf_counter() - started)
        data[name] = {"first": times[0], "again": spread(times[1:])}
        again = data[name]["again"]
        figures = f"{times[0] * 1e3:.0f} ms", f"{again['median'] * 1e3:.0f} ms", f"{max(times[1:]) * 1e3:.0f} ms"
        rows.append([name, *figures])
        console.print(*rows[-1], markup=False)

    if (folder_of("smollm2") / MANIFEST).exists():
        served = ServedModel.read(folder_of("smollm2"), Precision.INT8)
        measure("smollm2, 49,152 × 16 × 576, int8", searching(served.model, served.table))
    model = Backpack(SMALL).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            table = SenseTable(mapped_at_random(Path(folder) / str(dtype), dtype), model.embedding.detach())
            name = f"GPT-2's vocabulary, 50,257 × 16 × 768, {str(dtype).removeprefix('torch.')}"
            measure(name, searching(model, table))
    write(
        "find",
        f"A search for senses over a whole vocabulary ({THREADS} threads, by the clock)",
        "python -m tests.bench.find",
        ["table", "first", "again, median", "again, longest"],
        rows,
        data,
    )


if __name__ == "__main__":
    main()
