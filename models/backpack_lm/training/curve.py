"""The picture of a run's loss. Needs matplotlib, of the extra `train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from backpack_lm import strict_json


def plot(runs: Mapping[str, Sequence[Path]], out: Path, smooth: float = 0.95) -> None:
    """Draw the loss curves of runs into one picture: name → folders, each trained after the one before it."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, folders in runs.items():
        seen, curve, mean = 0, [], None
        for folder in folders:
            steps = {line["step"]: line for line in _lines(folder / "log.jsonl")}
            for step in sorted(steps):
                seen += steps[step]["tokens"]
                loss = steps[step]["loss"]
                mean = loss if mean is None else smooth * mean + (1 - smooth) * loss
                curve.append((seen / 1e6, mean))
        axes.plot(*zip(*curve, strict=True), label=name)
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats per token, smoothed)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out)


def plot_adapting(folder: Path, out: Path, smooth: float = 0.95) -> None:
    """Draw an adapted model's run: its divergence from the original, and what held-out texts cost beside it."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = {line["step"]: line for line in _lines(folder / "log.jsonl")}
    seen, curve, mean = 0, [], None
    for step in sorted(steps):
        seen += steps[step]["tokens"]
        value = steps[step]["divergence"]
        mean = value if mean is None else smooth * mean + (1 - smooth) * value
        curve.append((seen / 1e6, mean))
    if curve:
        axes.plot(*zip(*curve, strict=True), label="divergence, training (smoothed)")
        tokens = seen / len(curve) / 1e6
        checks = {line["step"]: line["held_out"] for line in _lines(folder / "held-out.jsonl")}
        for name in next(iter(checks.values()), {}):
            excess = [(step * tokens, each[name]["backpack"] - each[name]["original"]) for step, each in checks.items()]
            axes.plot(*zip(*sorted(excess), strict=True), ".-", label=f"{name}, held out: more than the original")
    axes.set(xlabel="training tokens (millions)", ylabel="nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out)


def _lines(file: Path) -> list[Any]:
    """What a log holds; a run that was resumed may have logged a step twice."""
    return [strict_json.parse(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
