"""Compare against as many separate calls: what one pass of the trunk for many releases saves.

python -m tests.bench.compare            the default model and Backpack-Small (random weights)
python -m tests.bench.compare --quick    the default model alone

Measured is what a replica computes for compiled releases, without wire and engine: of scores against Score, of
next tokens against a Compare for each release, each with its own pass of the trunk. Both sides read the same
releases: sparse ones, each of which edits one of the 20 words that the text is made of, and topics.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from backpack_lm.compare import Predicting, Scoring
from backpack_lm.config import SMALL
from backpack_lm.installed import folder_of
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import Cell, Edit, ReleaseContent, RevisionContent, ScaleEdit, TopicEdit
from backpack_serving.inference.served_model import ServedModel
from torch import Tensor

from tests.bench.report import console, spread, write

LENGTH, DISTINCT, TOP = 128, 20, 10
ROUNDS = 3


def sparse(draw: random.Random, words: Sequence[int], senses: int) -> tuple[Edit, ...]:
    return (ScaleEdit(tuple(Cell(draw.choice(words), s) for s in range(senses)), draw.uniform(-1, 0.9)),)


def topic(draw: random.Random, words: Sequence[int], senses: int) -> tuple[Edit, ...]:
    return (TopicEdit(tuple(draw.sample(words, 3)), draw.choice((1, 2, 3))),)


KINDS: dict[str, Callable[..., tuple[Edit, ...]]] = {"sparse": sparse, "topic": topic}


class Bench:
    def __init__(self, name: str, model: Backpack, table: SenseTable) -> None:
        self.name, self.model, self.table = name, model, table
        self.draw = random.Random(0)
        self.words = [self.draw.randrange(1, model.config.tokens) for _ in range(DISTINCT)]
        self.rows: list[list[str]] = []
        self.data: dict[str, Any] = {}

    def measure(self, kind: str, count: int, separate: int) -> None:
        """Both modes with `count` releases; of the separate calls `separate` are made, and counted for all."""
        config = self.model.config
        overlays = [
            Overlay.compile(
                ReleaseContent((RevisionContent("00" * 32, KINDS[kind](self.draw, self.words, config.num_senses)),)),
                self.table,
            )
            for _ in range(count)
        ]
        few, scale = overlays[:separate], count / min(count, separate)

        def text() -> Tensor:
            return torch.tensor([self.draw.choice(self.words) for _ in range(LENGTH)])

        def scored() -> None:
            Scoring(self.model, self.table, text()).read(overlays)

        def scored_alone() -> None:
            ids = text()
            for overlay in few:
                Scoring(self.model, self.table, ids).read([overlay])

        def predicted() -> None:
            Predicting(self.model, self.table, text(), TOP).read(overlays)

        def predicted_alone() -> None:
            ids = text()
            for overlay in few:
                Predicting(self.model, self.table, ids, TOP).read([overlay])

        self._compare(f"score, {kind}", count, scored, scored_alone, scale)
        self._compare(f"next token, {kind}", count, predicted, predicted_alone, scale)

    def _compare(
        self, what: str, count: int, ours: Callable[[], None], theirs: Callable[[], None], scale: float
    ) -> None:
        with torch.inference_mode():
            ours(), theirs()
            together, alone = [], []
            for _ in range(ROUNDS):
                together.append(seconds(ours))
                alone.append(seconds(theirs) * scale)
        ratios = [b / a for a, b in zip(together, alone, strict=True)]
        low, middle, high = (spread(ratios)[q] for q in ("q1", "median", "q3"))
        self.data[f"{what}, {count}"] = {
            "together": spread(together),
            "alone": spread(alone),
            "ratio": spread(ratios),
        }
        self.rows.append(
            [
                self.name,
                what,
                str(count),
                f"{spread(together)['median'] * 1e3:.4g} ms",
                f"{spread(alone)['median'] * 1e3:.4g} ms" + (" (from fewer)" if scale > 1 else ""),
                f"{middle:.1f} ({low:.1f}–{high:.1f})",
            ]
        )
        console.print(f"{self.name}: {what}, {count}: {middle:.1f}", markup=False)


def seconds(act: Callable[[], None]) -> float:
    """Of the processor: what else runs on a shared machine doesn't count."""
    started = time.process_time()
    act()
    return time.process_time() - started


def main(quick: bool) -> None:
    torch.set_num_threads(1)
    served = ServedModel.read(folder_of("micro"))
    benches = [Bench("default", served.model, served.table)]
    if not quick:
        torch.manual_seed(0)
        model = Backpack(SMALL).eval().requires_grad_(False)
        shape = SMALL.vocab_size, SMALL.num_senses
        # A table of the model's own would take minutes and scores hours, and neither is what is measured.
        table = SenseTable(torch.randn(*shape, SMALL.n_embd), model.embedding)
        table.peaks = torch.ones(shape)
        benches.append(Bench("Small", model, table))
    for bench in benches:
        default = bench is benches[0]
        for kind in KINDS:
            for count in (1, 16, 256) if default else (1, 16):
                bench.measure(kind, count, separate=32 if default else 4)
    write(
        "compare",
        f"One Compare against a call a release (float32, time of one processor, {LENGTH} tokens)",
        "python -m tests.bench.compare",
        ["model", "what", "releases", "one Compare", "a call each", "ratio (q1–q3)"],
        [row for bench in benches for row in bench.rows],
        {bench.name: bench.data for bench in benches},
    )


if __name__ == "__main__":
    main("--quick" in sys.argv)
