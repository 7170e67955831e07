"""The engine against its peers and against itself: every ratio from rounds taken side by side in one run.

python -m tests.bench.engine            the default model and Backpack-Small (random weights)
python -m tests.bench.engine --quick    the default model alone

Prompts are windows of this project's own texts, so that words repeat as they do; new tokens are greedy.
All of it in the precision that the processor is fastest in, unless a line says float32.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from backpack_lm.config import SMALL
from backpack_lm.kernels import Precision, Prediction
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import Add, Cell, Edit, Release, Revision, Swap, Topic, Vector
from backpack_lm.tokenizer import Tokenizer
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.loop import EngineLoop
from backpack_serving.engine.runner import Runner
from backpack_serving.engine.sampling import Sampling
from backpack_serving.engine.scheduler import Scheduler
from backpack_serving.engine.sequence import Request
from backpack_serving.engine.slots import OverlayRows, Slots
from backpack_serving.inference.served import ServedModel
from backpack_serving.settings import Settings, default_model
from torch import Tensor

from tests.bench.peers import VLLM
from tests.bench.report import console, spread, write

ROUNDS = 5
NEW = 64
ROOM = 65_536
STEP_TOKENS = Settings().step_tokens
FAST = Precision.AUTO.dtype()
TEXTS = [
    Path(__file__).parents[2] / name for name in ("ARCHITECTURE.md", "README.md", "CONTRIBUTING.md", "LICENSE")
]

Timed = Callable[[], float]
"""Does something once; tokens per second, or seconds."""


class Bench:
    """Measurements of one model."""

    def __init__(self, name: str, model: Backpack, table: SenseTable, text: list[int]) -> None:
        self.name, self.model, self.table, self.text = name, model, table, text
        self.storage = table.with_room(ROOM, FAST)
        self.empty = Overlay.compile(Release(), table)
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

    def request(self, prompt: tuple[int, ...], overlay: Overlay | None = None, new: int = NEW) -> Request:
        """Of a tenant of its own: nothing is shared between requests unless the engine shares among all."""
        sampling = Sampling(max_tokens=new, temperature=0.0, ignore_end_of_text=True)
        name = f"r{next(self.names)}"
        return Request(name, name, prompt, sampling, overlay or self.empty)

    def generate(self, engine: Engine, requests: list[Request]) -> float:
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
        rounds: int = ROUNDS,
    ) -> None:
        """Alternate both, and note the ratio: of rates ours to theirs; of times theirs to ours if `higher`."""
        ours(), theirs()
        a, b = [], []
        for _ in range(rounds):
            a.append(ours())
            b.append(theirs())
        faster = unit == "tokens/s"
        ratios = [x / y if faster or not higher else y / x for x, y in zip(a, b, strict=True)]
        self.note(what, a, b, ratios, unit, target)

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

    # ---- peers

    def vllm(self) -> None:
        """vLLM on this processor, GPT-2 of the same trunk, where `make vllm` has installed it."""
        peer = VLLM.start(self.model.config, str(FAST).removeprefix("torch."), 32)
        if peer is None:
            return
        with peer:
            for length in (64, 448):
                for batch in (1, 8, 32):
                    engine = self.engine(batch)

                    def ours(engine: Engine = engine, batch: int = batch, length: int = length) -> float:
                        return self.generate(engine, [self.request(self.prompt(length)) for _ in range(batch)])

                    def theirs(batch: int = batch, length: int = length) -> float:
                        return peer.measure(batch, length, NEW)["tokens_per_second"]

                    what = f"vLLM {peer.described.get('vllm', '')} GPT-2, {length}+{NEW}, batch {batch}"
                    self.compare(what, ours, theirs, "tokens/s", "1", rounds=3)

    def hugging_face(self, batch: int, length: int, dtype: torch.dtype) -> None:
        config = self.model.config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import GPT2Config, GPT2LMHeadModel
        gpt2 = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.n_positions,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                bos_token_id=0,
                eos_token_id=None,
                pad_token_id=0,
            )
        ).eval()
        gpt2 = gpt2.to(dtype)

        def theirs() -> float:
            ids = torch.tensor([self.prompt(length) for _ in range(batch)])
            started = time.perf_counter()
            with torch.inference_mode():
                made = gpt2.generate(ids, max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids))
            return batch * (made.shape[1] - length) / (time.perf_counter() - started)

        def ours() -> float:
            return self.generate(engine, [self.request(self.prompt(length)) for _ in range(batch)])

        engine = self.engine(batch, storage=self.storage if dtype == FAST else self.table.with_room(ROOM, dtype))
        kind = str(dtype).removeprefix("torch.")
        what = f"Hugging Face GPT-2 with cache, {kind}, {length}+{NEW}, batch {batch}"
        self.compare(what, ours, theirs, "tokens/s", "2" if batch == 32 else "", rounds=3)

    def published_class(self) -> None:
        """One token at a context of 512: the published class computes the whole prefix again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pyvene.models.backpack_gpt2.modelings_backpack_gpt2 import (
                BackpackGPT2Config,
                BackpackGPT2LMHeadModel,
            )
        values = {k: v for k, v in self.model.config.to_json().items() if k != "architectures"}
        BackpackGPT2LMHeadModel.tie_weights = lambda self, **_: None
        published = BackpackGPT2LMHeadModel(BackpackGPT2Config(**values)).eval()
        ids = torch.tensor([self.prompt(511)])
        places = torch.arange(511)[None]

        def theirs() -> float:
            started = time.perf_counter()
            with torch.inference_mode():
                published(ids, position_ids=places)
            return 1 / (time.perf_counter() - started)

        engine = self.engine(1)

        def ours() -> float:
            engine.add(self.request(self.prompt(480), new=32))
            while not engine.step():
                pass
            started, tokens = time.perf_counter(), 0
            while engine.busy:
                tokens += len(engine.step())
            return tokens / (time.perf_counter() - started)

        self.compare("published Backpack class, decoding at context 512", ours, theirs, "tokens/s", "50")

    # ---- ourselves

    def mix(self, batch: int, length: int) -> None:
        """Steps with the sense mix and without it in turn, on the same sequences: the difference is the mix."""
        engine = self.engine(batch, step_tokens=batch * length)  # all begin at once, so that none ends before
        kernels = engine._runner.kernels
        whole = kernels.mix
        nothing = torch.zeros(batch, self.model.config.n_embd)

        def no_mix(queries: Tensor, predictions: list[Prediction]) -> Tensor:
            return nothing[: len(predictions)]

        for _ in range(batch):
            engine.add(self.request(self.prompt(length), new=2 * 4 * ROUNDS + 2))
        while engine.load.queued or any(s.computed < length for s in engine._sequences.values()):
            engine.step()
        times: dict[bool, list[float]] = {True: [], False: []}
        for n in range(2 * 4 * ROUNDS):
            mixed = n % 2 == 0
            kernels.mix = whole if mixed else no_mix  # type: ignore[method-assign, assignment]
            started = time.perf_counter()
            engine.step()
            times[mixed].append(time.perf_counter() - started)
        what = f"a decode step with the sense mix, against without, context {length}, batch {batch}"
        ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
        self.note(what, times[True], times[False], ratios, "s", "at most 1.15")

    def releases(self) -> list[Overlay]:
        width, senses, vocabulary = (
            self.model.config.n_embd,
            self.model.config.num_senses,
            self.model.config.tokens,
        )
        compiled = []
        for n in range(256):
            draw = random.Random(n)
            tokens = [draw.randrange(1, vocabulary) for _ in range(12)]
            cells = tuple(Cell(t, s) for t in tokens for s in range(senses))
            edits: list[Edit] = [Swap(cells, draw.randrange(vocabulary), draw.randrange(vocabulary))]
            if n % 3 == 1:
                edits = [Add(cells, Vector.of([draw.gauss(0, 0.1) for _ in range(width)]))]
            if n % 3 == 2:
                edits.append(Topic(tuple(tokens), 1 + n % 2))
            compiled.append(Overlay.compile(Release((Revision("00" * 32, tuple(edits)),)), self.table))
        return compiled

    def distinct_releases(self) -> None:
        overlays = self.releases()
        engine = self.engine(32)

        def run(steered: bool) -> Timed:
            return lambda: self.generate(
                engine,
                [self.request(self.prompt(64), overlays[n] if steered else None, new=32) for n in range(256)],
            )

        what = "256 requests, 32 in a batch, each with another release, against none"
        self.compare(what, run(True), run(False), "tokens/s", "0.98")

    def prefix(self) -> None:
        """Time to the first token of a 448-token prompt whose first 400 another tenant has asked for."""
        overlays = self.releases()[:8]

        def first_token(engine: Engine, request: Request) -> float:
            started = time.perf_counter()
            engine.add(request)
            while not engine.step():
                pass
            elapsed = time.perf_counter() - started
            engine.abort(request.id)
            return elapsed

        warm_engine, cold_engine = self.engine(8, share=True), self.engine(8)
        shared = self.prompt(400)
        first_token(warm_engine, self.request(shared + self.prompt(48), overlays[0]))
        turn = iter(range(10_000))

        def ask(engine: Engine) -> Timed:
            return lambda: first_token(engine, self.request(shared + self.prompt(48), overlays[next(turn) % 8]))

        what = "first token, 400 of 448 tokens known from another tenant, against cold"
        self.compare(what, ask(warm_engine), ask(cold_engine), "s", "5")

    def budget(self) -> None:
        """What reading a prompt of 448 tokens in steps of few tokens does to 8 streams, and to throughput."""

        def longest_gap(engine: Engine) -> Timed:
            def measure() -> float:
                for _ in range(8):
                    engine.add(self.request(self.prompt(16), new=24))
                while engine.load.queued or any(s.computed < 16 for s in engine._sequences.values()):
                    engine.step()
                long = self.request(self.prompt(448), new=1)
                engine.add(long)
                longest, last = 0.0, time.perf_counter()
                while engine.busy:
                    engine.step()
                    now = time.perf_counter()
                    longest, last = max(longest, now - last), now
                return longest

            return measure

        def throughput(engine: Engine) -> Timed:
            return lambda: self.generate(engine, [self.request(self.prompt(448), new=16) for _ in range(4)])

        small, large = self.engine(9), self.engine(9, step_tokens=512)
        what = f"longest wait of 8 streams while 448 tokens are read, {STEP_TOKENS} a step against 512"
        self.compare(what, longest_gap(small), longest_gap(large), "s", "")
        what = f"throughput, 448+16, batch 4, prompts read {STEP_TOKENS} tokens a step against 512"
        self.compare(what, throughput(small), throughput(large), "tokens/s", "")

    def loop(self) -> None:
        direct = self.engine(32)

        async def through(loop: EngineLoop, requests: list[Request]) -> float:
            async def one(request: Request) -> int:
                return sum([len(outputs) async for outputs in loop.generate(request)])

            started = time.perf_counter()
            tokens = sum(await asyncio.gather(*map(one, requests)))
            return tokens / (time.perf_counter() - started)

        runner = asyncio.Runner()

        async def make() -> EngineLoop:
            return EngineLoop(self.engine(32))

        engine_loop = runner.run(make())

        def some() -> list[Request]:
            return [self.request(self.prompt(64)) for _ in range(32)]

        self.compare(
            "the engine through its asyncio loop, against stepping it, batch 32",
            lambda: runner.run(through(engine_loop, some())),
            lambda: self.generate(direct, some()),
            "tokens/s",
            "0.95",
        )
        runner.run(engine_loop.stop())
        runner.close()


def text() -> list[int]:
    """Token ids of this project's own texts, under the default model's tokenizer."""
    tokenizer = Tokenizer.read(default_model() / "tokenizer.json")
    return tokenizer.encode("\n".join(path.read_text("utf-8") for path in TEXTS))


def main(quick: bool) -> None:
    served, words = ServedModel.read(default_model()), text()
    default = Bench("default", served.model, served.table, words)
    benches = [default]
    for length in (64, 448):
        for batch in (1, 8, 32):
            default.hugging_face(batch, length, FAST)
    default.hugging_face(32, 64, torch.float32)
    if not quick:
        torch.manual_seed(0)
        model = Backpack(SMALL).eval().requires_grad_(False)
        small = Bench("Small", model, model.sense_table(), words)
        # Topic denominators are hours of arithmetic, and what they are changes no time.
        small.table.peaks = torch.ones(SMALL.vocab_size, SMALL.num_senses)
        benches.append(small)
        small.vllm()
        small.hugging_face(32, 64, FAST)
        small.hugging_face(32, 64, torch.float32)
    for bench in benches:
        bench.published_class()
        bench.mix(32, 64)
        bench.mix(32, 448)
        bench.distinct_releases()
        bench.prefix()
        bench.budget()
    default.loop()
    write(
        "engine",
        f"The engine against its peers and itself ({FAST}, {torch.get_num_threads()} threads)".replace(
            "torch.", ""
        ),
        "python -m tests.bench.engine",
        ["model", "ours against", "ours", "theirs", "ratio (q1–q3)", "target"],
        [row for bench in benches for row in bench.rows],
        {bench.name: bench.data for bench in benches},
    )


if __name__ == "__main__":
    main("--quick" in sys.argv)
