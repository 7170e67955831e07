"""One model in the engine, and both sides of a ratio measured in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from backpack_lm.config import SMALL, BackpackConfig
from backpack_lm.installed import folder_of
from backpack_lm.kernels import Caches, Kernels, Precision, choose
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
from backpack_serving.settings import Settings
from torch import Tensor

from tests.bench.report import console, spread

ROUNDS = 5
SHAPES = tuple((length, batch) for length in (64, 448) for batch in (1, 8, 32))
"""Tokens of prompts, and sequences, that peers are compared at."""
NEW = 64
ROOM = 65_536
STEP_TOKENS = Settings().step_tokens
FAST = Precision.AUTO.dtype()
INT8 = next((precision for precision in Precision if precision == "int8"), None)
"""None until there is one: then nothing is compared in it."""
TEXTS = [Path(__file__).parents[2] / name for name in ("ARCHITECTURE.md", "README.md", "CONTRIBUTING.md", "LICENSE")]

LLAMA_135M = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 49152,
    "max_position_embeddings": 512,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
"""SmolLM2-135M's shape, with the positions of Backpack-Small."""

Timed = Callable[[], float]
"""Does something once; tokens per second, or seconds."""


class Bench:
    """Measurements of one model."""

    def __init__(self, name: str, model: Backpack, table: SenseTable, text: list[int], rounds: int = ROUNDS) -> None:
        self.name, self.model, self.table, self.text, self.rounds = name, model, table, text, rounds
        self._storages: dict[Precision, Tensor] = {}
        self.empty = Overlay.compile(ReleaseContent(), table)
        self.rows: list[list[str]] = []
        self.data: dict[str, Any] = {}
        self.draw = random.Random(0)
        self.names = count()

    def engine(
        self,
        batch: int,
        share: bool = False,
        precision: Precision = Precision.AUTO,
        step_tokens: int = STEP_TOKENS,
        kernels: Callable[[Caches], Kernels] = choose,
    ) -> Engine:
        runner = Runner(self.model, self._storage(precision), batch, kernels)
        return Engine(runner, Slots(batch), OverlayRows(ROOM), Scheduler(step_tokens, 1024), share)

    def _storage(self, precision: Precision) -> Tensor:
        """The sense table with room for releases: what an engine's precision follows from."""
        if precision not in self._storages:
            self._storages[precision] = self.table.with_room(ROOM, precision.dtype())
        return self._storages[precision]

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

    def batch(self, engine: Engine, size: int, length: int = 64) -> Timed:
        """As many prompts of a length at once, each continued by `NEW` tokens."""
        return lambda: self.generate(engine, [self.request(self.prompt(length)) for _ in range(size)])

    def compare(
        self,
        what: str,
        ours: Timed,
        theirs: Timed,
        unit: str,
        target: str,
        higher: bool = True,
        rounds: int | None = None,
        bound: Timed | None = None,
    ) -> None:
        """Alternate both, and note the ratio: of rates ours to theirs; of times theirs to ours if `higher`.

        `bound` measures the rate that this machine allows (bound.py): the ratio at it stands beside the target.
        """
        assert bound is None or unit == "tokens/s", "a bound is a rate"
        ours(), theirs()
        a, b, bounds = [], [], []
        for _ in range(rounds or self.rounds):
            a.append(ours())
            b.append(theirs())
            if bound is not None:
                bounds.append(bound() / b[-1])
        faster = unit == "tokens/s"
        ratios = [x / y if faster or not higher else y / x for x, y in zip(a, b, strict=True)]
        if bound is not None:
            target += f" (at this machine's bound {spread(bounds)['median']:.2f})"
        self.note(what, a, b, ratios, unit, target)
        if bound is not None:
            self.data[what]["bound"] = spread(bounds)

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
    served = ServedModel.read(folder_of("micro"))
    # Its rounds are short, and what else the machine does shows in them.
    return Bench("default", served.model, served.table, text(), rounds=3 * ROUNDS)


def small(senses: bool = True) -> Bench:
    """Backpack-Small with random weights, which cost what trained ones do. Without `senses`, which take minutes to
    compute, its sense vectors are random as well."""
    return _random("Small", SMALL, senses)


def llama() -> Bench:
    """16 senses of head width 64 on a Llama trunk of 135 million weights, all random."""
    config = {**LLAMA_135M, "num_senses": 16, "sense_head": 64}
    return _random("Llama 135M", BackpackConfig.from_json(config), senses=False)


def _random(name: str, config: BackpackConfig, senses: bool) -> Bench:
    torch.manual_seed(0)
    model = Backpack(config).eval().requires_grad_(False)
    with console.status(f"making the sense table of {name}, some minutes"):
        shape = (config.vocab_size, config.num_senses, config.n_embd)
        table = model.sense_table() if senses else model.table_of(torch.randn(shape, dtype=FAST) * 0.02)
    bench = Bench(name, model, table, text())
    # Topic denominators are hours of arithmetic, and what they are changes no time.
    bench.table.peaks = torch.ones(config.vocab_size, config.num_senses)
    return bench


def text() -> list[int]:
    """Token ids of this project's own texts, under the default model's tokenizer."""
    tokenizer = Tokenizer.read(folder_of("micro") / "tokenizer.json")
    return tokenizer.encode("\n".join(path.read_text("utf-8") for path in TEXTS))


MODELS = {"default": default, "Small": small, "Llama 135M": llama}
