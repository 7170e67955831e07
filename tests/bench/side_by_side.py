"""One model in the engine, and both sides of a ratio measured in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from backpack_lm.config import SMALL
from backpack_lm.kernels import Precision
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import ReleaseContent
from backpack_lm.tokenizer import Tokenizer
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.runner import Runner
from backpack_serving.engine.scheduler import Scheduler
from backpack_serving.engine.sequence import GenerationRequest
from backpack_serving.engine.slots import OverlayRows, Slots
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.sampling import SamplingParams
from backpack_serving.settings import Settings, default_model
from torch import Tensor

from tests.bench.report import console, spread

ROUNDS = 5
NEW = 64
ROOM = 65_536
STEP_TOKENS = Settings().step_tokens
FAST = Precision.AUTO.dtype()
TEXTS = [Path(__file__).parents[2] / name for name in ("ARCHITECTURE.md", "README.md", "CONTRIBUTING.md", "LICENSE")]

Timed = Callable[[], float]
"""Does something once; tokens per second, or seconds."""


class Bench:
    """Measurements of one model."""

    def __init__(self, name: str, model: Backpack, table: SenseTable, text: list[int], rounds: int = ROUNDS) -> None:
        self.name, self.model, self.table, self.text, self.rounds = name, model, table, text, rounds
        self.storage = table.with_room(ROOM, FAST)
        self.empty = Overlay.compile(ReleaseContent(), table)
        self.rows: list[list[str]] = []
        self.data: dict[str, Any] = {}
        self.draw = random.Random(0)
        self.names = count()

    def engine(
        self, batch: int, share: bool = False, storage: Tensor | None = None, step_tokens: int = STEP_TOKENS
    ) -> Engine:
        runner = Runner(self.model, self.storage if storage is None else storage, batch)
        return Engine(runner, Slots(batch), OverlayRows(ROOM), Scheduler(step_tokens, 1024), share)

    def prompt(self, length: int) -> tuple[int, ...]:
        start = self.draw.randrange(len(self.text) - length)
        return tuple(self.text[start : start + length])

    def request(
        self, prompt: tuple[int, ...], overlay: Overlay | None = None, new: int = NEW, **sampling: float
    ) -> GenerationRequest:
        """Of a tenant of its own: nothing is shared between requests unless the engine shares among all. Greedy
        unless `sampling` says how tokens are drawn.
        """
        number = next(self.names)
        how = {"temperature": 0.0, "seed": number, **sampling}
        chosen, name = SamplingParams(max_tokens=new, ignore_end_of_text=True, **how), f"r{number}"  # type: ignore[arg-type]
        return GenerationRequest(name, name, prompt, chosen, overlay or self.empty)

    def generate(self, engine: Engine, requests: list[GenerationRequest]) -> float:
        """Tokens per second of all requests at once, their prompts' time included."""
        started, tokens = time.perf_counter(), 0
        for request in requests:
            engine.add(request)
        while engine.busy:
            tokens += len(engine.step())
        return tokens / (time.perf_counter() - started)

    def compare(
        self,
        what: str,
        ours: Timed,
        theirs: Timed,
        unit: str,
        target: str,
        higher: bool = True,
        rounds: int | None = None,
    ) -> None:
        """Alternate both, and note the ratio: of rates ours to theirs; of times theirs to ours if `higher`."""
        ours(), theirs()
        a, b = [], []
        for _ in range(rounds or self.rounds):
            a.append(ours())
            b.append(theirs())
        faster = unit == "tokens/s"
        ratios = [x / y if faster or not higher else y / x for x, y in zip(a, b, strict=True)]
        self.append_tokens(what, a, b, ratios, unit, target)

    def note(self, what: str, a: list[float], b: list[float], ratios: list[float], unit: str, target: str) -> None:
        self.data[what] = {"ours": spread(a), "theirs": spread(b), "ratio": spread(ratios), "unit": unit}
        low, middle, high = (spread(ratios)[q] for q in ("q1", "median", "q3"))
        scale, shown = (1.0, unit) if unit == "tokens/s" else (1e3, "ms")
        self.rows.append(
            [
                self.name,
                what,
                f"{spread(a)['median'] * scale:.4g} {shown}",
                f"{spread(b)['median'] * scale:.4g} {shown}",
                f"{middle:.2f} ({low:.2f}–{high:.2f})",
                target,
            ]
        )
        console.print("  ".join(self.rows[-1]), markup=False)

    def reading(self, engine: Engine, length: int) -> bool:
        """Whether some prompt of that length isn't read yet."""
        return bool(engine.load.queued) or any(s.computed < length for s in engine._sequences.values())


def default() -> Bench:
    served = ServedModel.read(default_model())
    # Its rounds are short, and what else the machine does shows in them.
    return Bench("default", served.model, served.table, text(), rounds=3 * ROUNDS)


def small(senses: bool = True) -> Bench:
    """Backpack-Small with random weights, which cost what trained ones do. Without `senses`, which take minutes to
    compute, its sense vectors are random as well."""
    torch.manual_seed(0)
    model = Backpack(SMALL).eval().requires_grad_(False)
    with console.status("computing the sense table of Backpack-Small, some minutes"):
        shape = (SMALL.vocab_size, SMALL.num_senses, SMALL.n_embd)
        table = model.sense_table() if senses else model.table_of(torch.randn(shape, dtype=FAST) * 0.02)
    bench = Bench("Small", model, table, text())
    # Topic denominators are hours of arithmetic, and what they are changes no time.
    bench.table.peaks = torch.ones(SMALL.vocab_size, SMALL.num_senses)
    return bench


def text() -> list[int]:
    """Token ids of this project's own texts, under the default model's tokenizer."""
    tokenizer = Tokenizer.read(default_model() / "tokenizer.json")
    return tokenizer.encode("\n".join(path.read_text("utf-8") for path in TEXTS))
