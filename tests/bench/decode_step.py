"""Where the time of a decode step goes, for both models: python -m tests.bench.decode_step

Milliseconds of a step in which each sequence gets one token, greedily. The trunk's parts are counted in the
library, all others around the functions that do them; `Python between` is what is left.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from backpack_lm.kernels.native_trunk import PARTS, NativeTrunk
from backpack_serving.engine import executor as executor_module
from backpack_serving.engine.engine import Engine

from tests.bench import side_by_side
from tests.bench.report import spread, write
from tests.bench.side_by_side import FAST, Bench

SHAPES = ((1, 64), (32, 64), (32, 400))
"""Sequences, and tokens that each begins with."""
STEPS = 40


class Clock:
    """Seconds spent in functions, less those in others that they call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                took = time.perf_counter() - started
                self.seconds[name] += took - self._inner.pop()
                self._inner[-1] += took

        return timed


def profile(bench: Bench, batch: int, length: int) -> dict[str, float]:
    """Milliseconds of a step by part; `step` is the median of steps without any clock."""
    engine = bench.engine(batch, step_tokens=batch * length)
    for _ in range(batch):
        engine.add(bench.request(bench.prompt(length), new=2 * STEPS + 2))
    while bench.reading(engine, length):
        engine.step()
    whole = []
    for _ in range(STEPS):
        started = time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - started)
    parts = _parts(engine)
    return {"step": spread(whole)["median"] * 1e3} | {name: 1e3 * seconds / STEPS for name, seconds in parts.items()}


def _parts(engine: Engine) -> dict[str, float]:
    """Seconds of `STEPS` steps."""
    clock, runner = Clock(), engine._executor
    kernels, trunk = runner.kernels, runner._trunk
    counted = trunk.seconds.clone() if isinstance(trunk, NativeTrunk) else None
    clocked: tuple[tuple[Any, str, str], ...] = (
        (kernels, "append_tokens", "append tokens"),
        (runner, "_trunk", "trunk"),
        (kernels, "mix", "sense mix"),
        (runner, "_head", "head"),
        (executor_module, "choose_all", "choose tokens"),
        (engine._scheduler, "plan", "schedule"),
        (engine, "_commit_token", "settle"),
    )
    originals = [getattr(owner, name) for owner, name, _ in clocked]
    for (owner, name, called), original in zip(clocked, originals, strict=True):
        setattr(owner, name, clock.around(called, original))
    step = clock.around("Python between", engine.step)
    for _ in range(STEPS):
        step()
    for (owner, name, _), original in zip(clocked, originals, strict=True):
        setattr(owner, name, original)
    seconds = dict(clock.seconds)
    if counted is not None:
        inner = dict(zip(PARTS, (trunk.seconds - counted).tolist(), strict=True))
        rest = seconds.pop("trunk") - sum(inner.values())
        seconds = {f"trunk: {name}": part for name, part in inner.items()} | {"trunk: call": rest} | seconds
    return seconds


def main() -> None:
    argparse.ArgumentParser(prog="python -m tests.bench.decode_step", description=__doc__).parse_args()
    benches = [side_by_side.default(), side_by_side.small(senses=False)]
    found = {(b.name, *shape): profile(b, *shape) for b in benches for shape in SHAPES}
    names = list(dict.fromkeys(name for parts in found.values() for name in parts))

    def cell(parts: dict[str, float], name: str) -> str:
        total = sum(parts.values()) - parts["step"]
        share = "" if name == "step" else f" ({parts.get(name, 0) / total:.0%})"
        return f"{parts.get(name, 0):.3f}{share}"

    write(
        "decode_step",
        f"A decode step, in milliseconds ({FAST}, {torch.get_num_threads()} threads)".replace("torch.", ""),
        "python -m tests.bench.decode_step",
        ["part", *(f"{model}, batch {batch}, context {length}" for model, batch, length in found)],
        [[name, *(cell(parts, name) for parts in found.values())] for name in names],
        {f"{model}, {batch}, {length}": parts for (model, batch, length), parts in found.items()},
    )


if __name__ == "__main__":
    main()
