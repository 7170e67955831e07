"""What ranks of an H100 node would make of a decode step, computed and not measured: docs/sizing.md has the formula."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

from backpack_lm.config import BackpackConfig
from backpack_lm.sharding import fitting_ranks

from tests.bench.report import write

MODELS = {
    "1.4 B": BackpackConfig.gpt2(50_257, 1024, 2048, n_layer=24, n_head=16, num_senses=16),
    "8 B, adapted": BackpackConfig.from_json(
        {
            "model_type": "llama",
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "num_senses": 16,
            "sense_head": 128,
        }
    ),
}
BATCHES, RANKS, CONTEXT = (1, 32, 256), (1, 2, 4, 8), 1024


@dataclass(frozen=True)
class Machine:
    """What limits a step: bytes a second of memory and of links, operations a second, seconds of a collective and of a
    launch.

    Memory, links and operations are those of an H100 SXM5 (https://glennklockwood.com/garden/processors/h100):
    3.35 TB/s, 450 GB/s each way, 989 TFLOPS in bfloat16. Seconds are assumed, not measured.
    """

    memory: float = 3.35e12
    link: float = 450e9
    operations: float = 989e12
    collective: float = 15e-6
    launch: float = 5e-6
    launches: int = 14
    """Of a layer, where no graph is captured: as ranks are computed."""


@dataclass(frozen=True)
class Cost:
    """Of a decode step of B sequences on n ranks: bytes of a rank's memory, read and received, and seconds."""

    resident: float
    read: float
    received: float
    operations: float
    seconds: float

    @classmethod
    def of(cls, config: BackpackConfig, ranks: int, batch: int, context: int, machine: Machine, width: int = 2) -> Cost:
        """In a dtype of so many bytes, sums of the mix and logits in float32."""
        layer, d, V, k = config.trunk.layer, config.n_embd, config.vocab_size, config.num_senses
        groups = max(1, layer.kv_heads // ranks)
        matrices, alpha, head = _weights(config, ranks)
        weights = width * (matrices + alpha + head)
        positions = width * (config.trunk.depth * 2 * groups * layer.head_width + k / ranks * config.sense_head_width)
        rows = width * k / ranks * d
        # The embeddings are there twice: the trunk's and annealing's.
        resident = weights + V * rows + 2 * width * V * d + batch * context * positions
        read = weights + batch * context * (positions + rows)
        sums = 2 * config.trunk.depth
        received = (ranks - 1) * batch * (sums * 2 * d + 4 * d + 4 * -(-V // ranks))
        operations = batch * (2 * (matrices + alpha + head) + 2 * context * (positions + rows) / width)
        launches = config.trunk.depth * machine.launches * machine.launch * (ranks > 1)
        collectives = (sums + 2) * machine.collective * (ranks > 1) + received / machine.link
        work = max(read / machine.memory, operations / machine.operations)
        return cls(resident, read, received, operations, max(work, launches) + collectives)


def _weights(config: BackpackConfig, ranks: int = 1) -> tuple[float, float, float]:
    """How many a rank has in the trunk's matrices, in those of queries and keys of sense weights, and in the head."""
    layer, d = config.trunk.layer, config.n_embd
    heads, groups = layer.heads // ranks, max(1, layer.kv_heads // ranks)
    mlp = (3 if layer.gated else 2) * d * layer.inner / ranks
    matrices = config.trunk.depth * (d * layer.head_width * (2 * heads + 2 * groups) + mlp)
    return matrices, 2 * config.num_senses * config.sense_head_width * d / ranks, config.vocab_size * d / ranks


def least_seconds(config: BackpackConfig, machine: Machine, width: int, batch: int, length: int, new: int) -> float:
    """What reading prompts of `length` tokens and writing `new` ones takes a machine at least, on one rank.

    Of a prompt, products with weights alone: all of the trunk's, the keys of sense weights, queries at the end. Then
    steps that read all weights, keys and values, and multiply with them and with sense vectors, which may be cached.
    """
    matrices, alpha, head = _weights(config)
    reading = 2 * batch * (length * (matrices + alpha / 2) + alpha / 2 + head) / machine.operations
    steps = (Cost.of(config, 1, batch, length + n, machine, width) for n in range(1, new))
    rows = width * config.num_senses * config.n_embd
    return reading + sum(
        max((step.read - batch * (length + n) * rows) / machine.memory, step.operations / machine.operations)
        for n, step in enumerate(steps, 1)
    )


def main() -> None:
    argparse.ArgumentParser(prog="python -m tests.bench.sizing", description=__doc__).parse_args()
    rows, data, machine = [], {}, Machine()
    for name, config in MODELS.items():
        for ranks in (n for n in RANKS if n in fitting_ranks(config)):
            costs = [Cost.of(config, ranks, batch, CONTEXT, machine) for batch in BATCHES]
            resident = [f"{cost.resident / 1e9:.1f}" for cost in costs]
            received = [f"{cost.received / 1e6:.2f}" for cost in costs]
            made = [f"{batch / cost.seconds:,.0f}" for batch, cost in zip(BATCHES, costs, strict=True)]
            rows.append([name, str(ranks), *(" / ".join(some) for some in (resident, received, made))])
            data[f"{name}, {ranks} ranks"] = dict(zip(map(str, BATCHES), map(asdict, costs), strict=True))
    write(
        "sizing",
        f"Computed, not measured: ranks of an H100 node, {CONTEXT} tokens of context, bfloat16, batch 1 / 32 / 256",
        "python -m tests.bench.sizing",
        ["model", "ranks", "GB of a rank", "MB received a step", "tokens/s"],
        rows,
        {"machine": asdict(machine), "costs": data},
    )


if __name__ == "__main__":
    main()
