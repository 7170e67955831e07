"""The engine against its peers and against itself: every ratio from rounds taken side by side in one run.

Prompts are windows of this project's own texts, so that words repeat as they do; new tokens are greedy,
unless a line says how they are drawn.
All of it in the precision that the processor is fastest in, unless a line says float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from tests.bench.against_itself import (
    bias,
    budget,
    distinct_releases,
    drawing,
    int8,
    loop,
    mix,
    plain_on_avx2,
    prefix,
    sampling,
    structured,
)
from tests.bench.against_peers import hugging_face, llama_cpp, published_class, vllm
from tests.bench.report import write
from tests.bench.side_by_side import FAST, MODELS, Bench


def hugging_faces(bench: Bench) -> None:
    for length in (64, 448):
        for batch in (1, 8, 32):
            # On Small a round of the largest shape is over a minute of theirs: two say as much.
            rounds = 2 if bench.name == "Small" and (batch, length) == (32, 448) else 3
            hugging_face(bench, batch, length, FAST, rounds)
    hugging_face(bench, 32, 64, torch.float32)


def mixes(bench: Bench) -> None:
    for length in (64, 448):
        mix(bench, 32, length)


def biases(bench: Bench) -> None:
    for words in (4, 256):
        bias(bench, 32, 64, words)


PARTS: dict[str, Callable[[Bench], None]] = {
    "vllm": vllm,
    "llama.cpp": llama_cpp,
    "hugging-face": hugging_faces,
    "published": published_class,
    "int8": int8,
    "avx2": plain_on_avx2,
    "mix": mixes,
    "bias": biases,
    "releases": distinct_releases,
    "prefix": prefix,
    "budget": budget,
    "drawing": drawing,
    "sampling": sampling,
    "structured": structured,
    "loop": loop,
}
NOT_OF = {
    "default": {"vllm", "llama.cpp"},  # its targets name the larger trunks
    "Small": {"structured"},  # it has no tokenizer
    "Llama 135M": set(PARTS) - {"vllm", "llama.cpp", "int8", "avx2", "mix", "releases"},
}
"""Parts that aren't measured with a model."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.engine", description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append", help="one alone (all: some forty minutes)")
    parser.add_argument("--part", choices=PARTS, action="append", help="one alone, or some; nothing is written then")
    parser.add_argument("--out", default="", help="write what was chosen to this name in tests/bench/results")
    chosen = parser.parse_args()
    models, parts = chosen.model or list(MODELS), chosen.part or list(PARTS)
    benches = [MODELS[name]() for name in models]
    for bench in benches:
        for part in parts:
            if part not in NOT_OF.get(bench.name, set()):
                PARTS[part](bench)
    if (chosen.model or chosen.part) and not chosen.out:
        return
    write(
        chosen.out or "engine",
        f"The engine against its peers and itself ({FAST}, {torch.get_num_threads()} threads)".replace("torch.", ""),
        "python -m tests.bench.engine" + "".join(f" {word!r}" if " " in word else f" {word}" for word in sys.argv[1:]),
        ["model", "ours against", "ours", "theirs", "ratio (q1–q3)", "target"],
        [row for bench in benches for row in bench.rows],
        {bench.name: bench.data for bench in benches},
    )


if __name__ == "__main__":
    main()
