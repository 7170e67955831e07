"""The picture of a run's loss. Needs matplotlib, of the extra `train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from backpack_lm import strict_json


def plot(runs: Mapping[str, Sequence[Path]], out: Path, smooth: float = 0.95) -> None:
    """Draw the loss curves of runs into one picture: name → folders, each trained after the one before it."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, folders in runs.items():
        seen, curve, mean = 0, [], None
        for folder in folders:
            lines = (strict_json.parse(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines())
            steps = {line["step"]: line for line in lines}  # a resumed run may log a step twice
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
