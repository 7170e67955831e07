"""Ranks of tiny models, as a replica starts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from backpack_lm.checkpoint import save
from backpack_lm.config import BackpackConfig
from backpack_lm.installed import folder_of
from backpack_lm.kernels import Precision
from backpack_lm.manifest import TOKENIZER
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.executor import Executor
from backpack_serving.engine.ranks import SeveralRanks
from backpack_serving.engine.scheduler import Scheduler
from backpack_serving.engine.slots import OverlayRows, Slots
from backpack_serving.inference.ranks import LocalRank, LocalRanks, RankPlan, start
from backpack_serving.inference.served_model import ServedModel

from tests.engine.conftest import D, K, T, V
from tests.models.trunk_shapes import random_model

SLOTS, ROOM = 4, 4 * V * K

GPT2 = BackpackConfig.gpt2(V, T, D, 3, 4, num_senses=K, eos_token_id=0, num_tokens=V - 4)
LLAMA = BackpackConfig.from_json(
    {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": 50,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": T,
        "tie_word_embeddings": False,
        "num_senses": K,
        "eos_token_id": 0,
        "num_tokens": V - 4,
        "query_layers": [2, 3],
        "key_layers": [1],
        "sense_theta": 500.0,
    }
)


Ranked = Mapping[str, tuple[ServedModel, SeveralRanks]]


@contextmanager
def started(
    folder: Path, ranks: int, precision: Precision = Precision.FLOAT32, **configs: BackpackConfig
) -> Iterator[Ranked]:
    """Random models of these shapes, and ranks that share each: all started at once."""
    models: dict[str, ServedModel] = {}
    for seed, (name, config) in enumerate(configs.items()):
        save(random_model(config, seed), folder_of("micro") / TOKENIZER, folder / name)
        models[name] = ServedModel.read(folder / name, precision, ROOM)

    def begin(served: ServedModel) -> SeveralRanks:
        return start(plan_for(served, ranks), served, LocalRanks())

    with ThreadPoolExecutor(len(models)) as together:
        executors = dict(zip(models, together.map(begin, models.values()), strict=True))
    try:
        yield {name: (models[name], executors[name]) for name in models}
    finally:
        with ThreadPoolExecutor(len(models)) as together:
            list(together.map(SeveralRanks.close, executors.values()))


def plan_for(served: ServedModel, ranks: int) -> RankPlan:
    assert served.table_file is not None
    fingerprint, dtype = served.manifest.fingerprint, served.storage.dtype
    return RankPlan(ranks, served.folder, fingerprint, served.table_file, dtype, "cpu", 1, SLOTS, ROOM)


def process_of(executor: SeveralRanks, rank: int = 1) -> LocalRank:
    process = executor._peers[rank - 1].process
    assert isinstance(process, LocalRank)
    return process


def engine_over(executor: Executor, step_tokens: int = 16, share_prefixes: bool = False) -> Engine:
    """Over all that the executor has: one such engine at a time."""
    return Engine(executor, Slots(SLOTS), OverlayRows(ROOM), Scheduler(step_tokens, 64), share_prefixes)
