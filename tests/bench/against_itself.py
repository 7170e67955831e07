"""The engine with and without: the sense mix, biases, releases, a known prefix, its loop."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from backpack_lm import processor
from backpack_lm.installed import folder_of
from backpack_lm.kernels import MixSpan
from backpack_lm.kernels.plain import PlainKernels
from backpack_lm.manifest import TOKENIZER
from backpack_lm.overlay import Overlay
from backpack_lm.patch import (
    AddEdit,
    BiasEdit,
    Cell,
    Edit,
    ReleaseContent,
    RevisionContent,
    SwapEdit,
    TopicEdit,
    Vector,
)
from backpack_lm.tokenizer import Tokenizer
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.loop import EngineLoop
from backpack_serving.engine.sequence import GenerationRequest, Grammar
from backpack_serving.inference.grammars import GrammarCompiler
from backpack_serving.sampling import TextStructure
from backpack_serving.wire.inference import COALESCE
from torch import Tensor

from tests.bench.bound import rate_at_bound
from tests.bench.side_by_side import FAST, INT8, NEW, ROUNDS, STEP_TOKENS, Bench, Timed

PAIRS = 200
"""Steps with biases and without: they differ by less than what else a machine does."""


def mix(bench: Bench, batch: int, length: int) -> None:
    """Steps with the sense mix and without it in turn, on the same sequences: the difference is the mix."""
    engine = _decoding(bench, batch, length, 4 * ROUNDS, [bench.empty])
    kernels = engine._executor.kernels
    whole = kernels.mix
    nothing = torch.zeros(batch, bench.model.config.n_embd)

    def no_mix(queries: Tensor, predictions: list[MixSpan]) -> Tensor:
        return nothing[: len(predictions)]

    def switch(mixed: bool) -> None:
        kernels.mix = whole if mixed else no_mix  # type: ignore[method-assign, assignment]

    what = f"a decode step with the sense mix, against without, context {length}, batch {batch}"
    _steps_in_turn(bench, engine, 4 * ROUNDS, switch, what, "at most 1.12")


def bias(bench: Bench, batch: int, length: int, words: int) -> None:
    """Steps with another release's bias for each sequence and without any in turn, on the same sequences."""
    draw, vocabulary = random.Random(0), bench.model.config.tokens
    edits = [BiasEdit(tuple(draw.sample(range(vocabulary), words)), -1.0) for _ in range(batch)]
    engine = _decoding(bench, batch, length, PAIRS, [_compile(bench, edit) for edit in edits])
    runner = engine._executor
    biases = runner._biases

    def switch(biased: bool) -> None:
        runner._biases = biases if biased else {}

    what = f"a decode step with {batch} releases' biases on {words} words each, against none, context {length}"
    _steps_in_turn(bench, engine, PAIRS, switch, what, "at most 1.03")


def _decoding(bench: Bench, batch: int, length: int, pairs: int, overlays: list[Overlay]) -> Engine:
    """An engine whose sequences have been read, under these overlays in turn, and decode for `_steps_in_turn`."""
    engine = bench.engine(batch, step_tokens=batch * length)  # all begin at once, so that none ends before
    for n in range(batch):
        engine.add(bench.request(bench.prompt(length), overlays[n % len(overlays)], new=2 * pairs + 2))
    while bench.reading(engine, length):
        engine.step()
    return engine


def _steps_in_turn(
    bench: Bench, engine: Engine, pairs: int, switch: Callable[[bool], None], what: str, target: str
) -> None:
    """Time steps with something and without it, switched before each."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for n in range(2 * pairs):
        switch(n % 2 == 0)
        started = time.perf_counter()
        engine.step()
        times[n % 2 == 0].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    bench.note(what, times[True], times[False], ratios, "s", target)


def int8(bench: Bench) -> None:
    """Weights and senses in int8 against the precision that this processor is fastest in otherwise."""
    if INT8 is None:
        return
    for batch in (1, 8, 32):
        narrow, wide = bench.engine(batch, precision=INT8), bench.engine(batch)
        what = f"int8 against {FAST}, 64+{NEW}, batch {batch}".replace("torch.", "")
        bench.compare(what, bench.batch(narrow, batch), bench.batch(wide, batch), "tokens/s", "")


def plain(bench: Bench) -> None:
    """The compiled library against torch's operations, which compute where there is no library."""
    for batch, target in ((1, "2"), (32, "1.5")):
        ours, theirs = bench.engine(batch), bench.engine(batch, kernels=PlainKernels)
        what = f"the library against torch's operations, {processor.features()[-1]}, {FAST}, 64+{NEW}, batch {batch}"
        rates = bench.batch(ours, batch), bench.batch(theirs, batch)
        bound = partial(rate_at_bound, bench.model.config, FAST, batch, 64, NEW)
        bench.compare(what.replace("torch.", ""), *rates, "tokens/s", target, rounds=3, bound=bound)


def plain_on_avx2(bench: Bench) -> None:
    """`plain` in a child process from which AVX-512 is hidden."""
    hidden = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    command = [sys.executable, "-m", "tests.bench.avx2", bench.name]
    done = subprocess.run(command, env=os.environ | hidden, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    bench.rows += found["rows"]
    bench.data |= found["data"]


def releases(bench: Bench) -> list[Overlay]:
    width, senses, vocabulary = (
        bench.model.config.n_embd,
        bench.model.config.num_senses,
        bench.model.config.tokens,
    )
    compiled = []
    for n in range(256):
        draw = random.Random(n)
        tokens = [draw.randrange(1, vocabulary) for _ in range(12)]
        cells = tuple(Cell(t, s) for t in tokens for s in range(senses))
        edits: list[Edit] = [SwapEdit(cells, draw.randrange(vocabulary), draw.randrange(vocabulary))]
        if n % 3 == 1:
            edits = [AddEdit(cells, Vector.of([draw.gauss(0, 0.1) for _ in range(width)]))]
        if n % 3 == 2:
            edits.append(TopicEdit(tuple(tokens), 1 + n % 2))
        compiled.append(_compile(bench, *edits))
    return compiled


def _compile(bench: Bench, *edits: Edit) -> Overlay:
    return Overlay.compile(ReleaseContent((RevisionContent("00" * 32, edits),)), bench.table)


def distinct_releases(bench: Bench) -> None:
    """256 releases, 64 requests a round: what else a machine does changes in seconds, so rounds are short."""
    overlays, engine = cycle(releases(bench)), bench.engine(32)

    def run(steered: bool) -> float:
        chosen = [next(overlays) if steered else None for _ in range(64)]
        return bench.generate(engine, [bench.request(bench.prompt(64), one, new=32) for one in chosen])

    what = "256 releases, 64 requests at once, 32 in a batch, each with another release, against none"
    bench.compare(what, partial(run, True), partial(run, False), "tokens/s", "0.99", rounds=4 * ROUNDS)


def prefix(bench: Bench) -> None:
    """Time to the first token of a 448-token prompt whose first 400 another tenant has asked for."""
    overlays = releases(bench)[:8]

    def first_token(engine: Engine, request: GenerationRequest) -> float:
        started = time.perf_counter()
        engine.add(request)
        while not engine.step():
            pass
        elapsed = time.perf_counter() - started
        engine.abort(request.id)
        return elapsed

    warm_engine, cold_engine = bench.engine(8, share=True), bench.engine(8)
    shared = bench.prompt(400)
    first_token(warm_engine, bench.request(shared + bench.prompt(48), overlays[0]))
    turn = iter(range(10_000))

    def ask(engine: Engine) -> Timed:
        return lambda: first_token(engine, bench.request(shared + bench.prompt(48), overlays[next(turn) % 8]))

    what = "first token, 400 of 448 tokens known from another tenant, against cold"
    bench.compare(what, ask(warm_engine), ask(cold_engine), "s", "5")


def budget(bench: Bench) -> None:
    """What reading a prompt of 448 tokens in steps of few tokens does to 8 streams, and to throughput."""

    def longest_gap(engine: Engine) -> Timed:
        def measure() -> float:
            for _ in range(8):
                engine.add(bench.request(bench.prompt(16), new=24))
            while bench.reading(engine, 16):
                engine.step()
            long = bench.request(bench.prompt(448), new=1)
            engine.add(long)
            longest, last = 0.0, time.perf_counter()
            while engine.busy:
                engine.step()
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
            return longest

        return measure

    def throughput(engine: Engine) -> Timed:
        return lambda: bench.generate(engine, [bench.request(bench.prompt(448), new=16) for _ in range(4)])

    small, large = bench.engine(9), bench.engine(9, step_tokens=512)
    what = f"longest wait of 8 streams while 448 tokens are read, {STEP_TOKENS} a step against 512"
    bench.compare(what, longest_gap(small), longest_gap(large), "s", "")
    what = f"throughput, 448+16, batch 4, prompts read {STEP_TOKENS} tokens a step against 512"
    bench.compare(what, throughput(small), throughput(large), "tokens/s", "")


def drawing(bench: Bench) -> None:
    """What it costs to draw tokens, of all or of the likeliest, instead of taking the greatest logit."""
    engine = bench.engine(32)

    def run(**sampling: Any) -> Timed:
        return lambda: bench.generate(engine, [bench.request(bench.prompt(64), **sampling) for _ in range(32)])

    ways = {"temperature 1": {}, "top_k 40": {"top_k": 40}, "top_p 0.9": {"top_p": 0.9}}
    for name, way in ways.items():
        what = f"tokens drawn with {name}, against greedy, batch 32"
        bench.compare(what, run(temperature=1.0, **way), run(), "tokens/s", "0.75")
    what = "tokens with log-probabilities and 5 alternatives, against without, batch 32"
    bench.compare(what, run(log_probabilities=5), run(), "tokens/s", "0.9")


def sampling(bench: Bench) -> None:
    """What each way to change the logits that are drawn from costs, against drawing from them as they are."""
    some = random.Random(0).sample(range(bench.model.config.tokens), 20)
    ways: dict[str, dict[str, Any]] = {
        "min_p 0.05": {"min_p": 0.05},
        "a repetition penalty": {"repetition_penalty": 1.2},
        "frequency and presence penalties": {"frequency_penalty": 0.5, "presence_penalty": 0.5},
        "20 biased tokens": {"logit_bias": tuple((token, 2.0) for token in some)},
        "10 bad words of two tokens": {"bad_words": tuple(zip(some[:10], some[10:], strict=True))},
        "min_tokens 64": {"min_tokens": NEW},
    }
    for batch in (1, 32):
        engine = bench.engine(batch)

        def run(engine: Engine = engine, batch: int = batch, **how: Any) -> Timed:
            return lambda: bench.generate(
                engine, [bench.request(bench.prompt(64), temperature=1.0, **how) for _ in range(batch)]
            )

        for name, way in ways.items():
            bench.compare(f"tokens with {name}, against without, batch {batch}", run(**way), run(), "tokens/s", "")


def structured(bench: Bench) -> None:
    """What it costs to hold texts to a JSON schema."""
    config = bench.model.config
    tokenizer = Tokenizer.read(folder_of("micro") / TOKENIZER)
    compiler = GrammarCompiler(tokenizer, config.tokens, [config.eos_token_id or 0])
    horse = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "kind": {"enum": ["ship", "horse"]}},
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    }
    endless = {"type": "array", "items": horse, "minItems": 1000}  # all texts are as long as without it
    grammar = asyncio.run(compiler.compiled("t", TextStructure("json_schema", json.dumps(endless))))
    for batch in (8, 32):
        engine = bench.engine(batch)

        def run(grammar: Grammar | None, engine: Engine = engine, batch: int = batch) -> Timed:
            some = {"temperature": 1.0}
            return lambda: bench.generate(
                engine, [replace(bench.request(bench.prompt(64), **some), grammar=grammar) for _ in range(batch)]
            )

        what = f"tokens held to a JSON schema, against any, batch {batch}"
        bench.compare(what, run(grammar), run(None), "tokens/s", "0.8")


def loop(bench: Bench) -> None:
    direct = bench.engine(32)

    async def through(loop: EngineLoop, requests: list[GenerationRequest], gather: float) -> float:
        async def one(request: GenerationRequest) -> int:
            return sum([len(outputs) async for outputs in loop.generate(request, gather)])

        started = time.perf_counter()
        tokens = sum(await asyncio.gather(*map(one, requests)))
        return tokens / (time.perf_counter() - started)

    runner = asyncio.Runner()

    async def make() -> EngineLoop:
        return EngineLoop(bench.engine(32))

    engine_loop = runner.run(make())

    def some() -> list[GenerationRequest]:
        return [bench.request(bench.prompt(64)) for _ in range(32)]

    for gather, how in ((0.0, "each token"), (COALESCE, f"those of {COALESCE * 1e3:.0f} ms together, as served")):
        bench.compare(
            f"the engine through its asyncio loop, {how}, against stepping it, batch 32",
            lambda gather=gather: runner.run(through(engine_loop, some(), gather)),  # type: ignore[misc]
            lambda: bench.generate(direct, some()),
            "tokens/s",
            "0.95",
        )
    runner.run(engine_loop.stop())
    runner.close()
