"""Others who run GPT-2, or a Backpack, beside us."""

from __future__ import annotations

import time
import warnings

import torch
from backpack_serving.engine.engine import Engine

from tests.bench.peers import VLLM
from tests.bench.side_by_side import FAST, NEW, ROOM, Bench


def vllm(bench: Bench) -> None:
    """vLLM on this processor, GPT-2 of the same trunk, where `make vllm` has installed it."""
    peer = VLLM.start(bench.model.config, str(FAST).removeprefix("torch."), 32)
    if peer is None:
        return
    with peer:
        for length in (64, 448):
            for batch in (1, 8, 32):
                engine = bench.engine(batch)

                def ours(engine: Engine = engine, batch: int = batch, length: int = length) -> float:
                    return bench.generate(engine, [bench.request(bench.prompt(length)) for _ in range(batch)])

                def theirs(batch: int = batch, length: int = length) -> float:
                    return peer.measure(batch, length, NEW)["tokens_per_second"]

                what = f"vLLM {peer.described.get('vllm', '')} GPT-2, {length}+{NEW}, batch {batch}"
                bench.compare(what, ours, theirs, "tokens/s", "1", rounds=3)


def hugging_face(bench: Bench, batch: int, length: int, dtype: torch.dtype, rounds: int = 3) -> None:
    config = bench.model.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.n_positions,
            n_embd=config.n_embd,
            n_layer=config.trunk.depth,
            n_head=config.trunk.layer.heads,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    gpt2 = gpt2.to(dtype)

    def theirs() -> float:
        ids = torch.tensor([bench.prompt(length) for _ in range(batch)])
        started = time.perf_counter()
        with torch.inference_mode():
            made = gpt2.generate(ids, max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids))
        return batch * (made.shape[1] - length) / (time.perf_counter() - started)

    def ours() -> float:
        return bench.generate(engine, [bench.request(bench.prompt(length)) for _ in range(batch)])

    engine = bench.engine(batch, storage=bench.storage if dtype == FAST else bench.table.with_room(ROOM, dtype))
    kind = str(dtype).removeprefix("torch.")
    what = f"Hugging Face GPT-2 with cache, {kind}, {length}+{NEW}, batch {batch}"
    bench.compare(what, ours, theirs, "tokens/s", "2" if batch == 32 else "", rounds=rounds)


def published_class(bench: Bench) -> None:
    """One token at a context of 512: the published class computes the whole prefix again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pyvene.models.backpack_gpt2.modelings_backpack_gpt2 import (
            BackpackGPT2Config,
            BackpackGPT2LMHeadModel,
        )
    values = {k: v for k, v in bench.model.config.to_json().items() if k != "architectures"}
    BackpackGPT2LMHeadModel.tie_weights = lambda self, **_: None
    published = BackpackGPT2LMHeadModel(BackpackGPT2Config(**values)).eval()
    ids = torch.tensor([bench.prompt(511)])
    places = torch.arange(511)[None]

    def theirs() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            published(ids, position_ids=places)
        return 1 / (time.perf_counter() - started)

    engine = bench.engine(1)

    def ours() -> float:
        engine.add(bench.request(bench.prompt(480), new=32))
        while not engine.step():
            pass
        started, tokens = time.perf_counter(), 0
        while engine.busy:
            tokens += len(engine.step())
        return tokens / (time.perf_counter() - started)

    bench.compare("published Backpack class, decoding at context 512", ours, theirs, "tokens/s", "50")
