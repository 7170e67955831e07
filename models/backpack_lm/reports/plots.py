"""The plots of reports, as SVG with the text kept as text. Needs matplotlib, of the extra `lab`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas

from backpack_lm.reports.report import Figure

PALETTE = ("#0f8276", "#3556a8", "#c77d1e", "#b4432f", "#7a5aa6", "#6b7480")
CROWDED = 8  # labels beside each other that still fit unturned


def bars(title: str, labels: Sequence[str], series: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> Figure:
    """Groups of bars: one group a label, one colour a series."""
    figure, axes = _axes(max(6.0, 0.3 * len(labels) * len(series)))
    width = 0.8 / len(series)
    for n, (name, values) in enumerate(series.items()):
        places = [at + (n - (len(series) - 1) / 2) * width for at in range(len(labels))]
        axes.bar(places, values, width * 0.94, label=name, color=PALETTE[n % len(PALETTE)])
    turned = {"rotation": 40, "ha": "right"} if len(labels) > CROWDED else {}
    axes.set_xticks(range(len(labels)), labels, **turned)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return _to_svg(figure, axes, title, legend=len(series) > 1)


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str) -> Figure:
    """Curves through (x, y) points, each point marked."""
    figure, axes = _axes(7.0)
    for n, (name, points) in enumerate(series.items()):
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, color=PALETTE[n % len(PALETTE)])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return _to_svg(figure, axes, title, legend=len(series) > 1)


def _axes(width: float) -> tuple[Any, Any]:
    figure = Canvas(figsize=(min(width, 14.0), 3.8), layout="constrained")
    return figure, figure.subplots()


def _to_svg(figure: Any, axes: Any, title: str, legend: bool) -> Figure:
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False)
    out = io.StringIO()
    # Fixed ids, no date and nothing else about the file: the same figures make the same file.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "backpack"}):
        figure.savefig(out, format="svg", metadata=nothing)
    return Figure(title, out.getvalue())
