"""The picture of a run's loss. Needs matplotlib, of the extra `train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from backpack_lm import strict_json
from backpack_lm.training.trainer import LOG

HELD_OUT = "held-out.jsonl"
"""Beside a run's log: what held-out texts cost."""


def plot(runs: Mapping[str, Sequence[Path]], out: Path) -> None:
    """Draw the loss curves of runs into one picture: name → folders, each trained after the one before it."""
    figure, axes = _labelled_axes("loss (nats per token, smoothed)")
    for name, folders in runs.items():
        axes.plot(*_smoothed_curve(folders, "loss"), label=name)
    _write_picture(figure, axes, out)


def plot_adapting(folder: Path, out: Path) -> None:
    """Draw an adapted model's run: its divergence from its teacher, and how much more held-out texts cost it."""
    figure, axes = _labelled_axes("nats per token")
    millions, divergence = _smoothed_curve([folder], "divergence")
    axes.plot(millions, divergence, label="divergence, training (smoothed)")
    checks = {line["step"]: line["held_out"] for line in _lines(folder / HELD_OUT)}
    at = [step * millions[-1] / len(millions) for step in sorted(checks)] if millions else []
    for name in next(iter(checks.values()), {}) if millions else ():
        excess = [checks[step][name]["backpack"] - checks[step][name]["teacher"] for step in sorted(checks)]
        axes.plot(at, excess, ".-", label=f"{name}, held out: above the teacher")
    _write_picture(figure, axes, out)


def _labelled_axes(ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="training tokens (millions)", ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _write_picture(figure: Figure, axes: Any, out: Path) -> None:
    axes.legend()
    figure.savefig(out)


def _smoothed_curve(folders: Sequence[Path], field: str, smooth: float = 0.95) -> tuple[list[float], list[float]]:
    """Millions of tokens seen after each step of runs, and the moving mean of a field of their logs."""
    seen, mean = 0, None
    millions: list[float] = []
    means: list[float] = []
    for folder in folders:
        steps = {line["step"]: line for line in _lines(folder / LOG)}  # a resumed run may log a step twice
        for step in sorted(steps):
            seen += steps[step]["tokens"]
            value = steps[step][field]
            mean = value if mean is None else smooth * mean + (1 - smooth) * value
            millions.append(seen / 1e6)
            means.append(mean)
    return millions, means


def _lines(file: Path) -> list[Any]:
    """The lines of a log; none if there is no such file yet."""
    return [strict_json.parse(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
