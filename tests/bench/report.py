"""What every benchmark writes: the machine, the figures as JSON, and a table to read."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
console = Console(stderr=True, highlight=False)


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the middle half of the values."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high, "n": len(values)}


def write(
    name: str, title: str, command: str, columns: Sequence[str], rows: Sequence[Sequence[str]], data: Any
) -> None:
    """Write results/NAME.json and .md, and show the table."""
    RESULTS.mkdir(exist_ok=True)
    described = machine()
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": described, "results": data}, indent=1) + "\n")
    lines = [f"# {title}", "", f"`{command}`, {described['time']}: {described['processor']}, "]
    lines[-1] += f"{described['cores']} cores, torch {described['torch']}, GPU {described['gpu'] or 'none'}."
    lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    console.print(text, markup=False)
