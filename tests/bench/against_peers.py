"""Others who run GPT-2, or a Backpack, beside us."""

from __future__ import annotations

import time
import warnings
from functools import partial

import torch
from backpack_lm.config import SMALL
from backpack_lm.kernels import Precision

from tests.bench.bound import rate_at_bound
from tests.bench.peers import VLLM, LlamaCpp, Peer, transformer
from tests.bench.side_by_side import FAST, INT8, NEW, SHAPES, Bench

READ_AT_ONCE = 512
"""Tokens of a step, where peers read 512 or 2,048. What is served reads fewer (BACKPACK_STEP_TOKENS), so that streams
wait less for others' prompts."""


def vllm(bench: Bench) -> None:
    """vLLM on this processor, the Transformer of the same trunk, where `make vllm` has installed it."""
    precision, target = str(FAST).removeprefix("torch."), "1.5" if bench.model.config is SMALL else "1.3"
    beside(bench, VLLM, precision, Precision.AUTO, dict.fromkeys((1, 8, 32), target))


def llama_cpp(bench: Bench) -> None:
    """llama.cpp the same way, where `make llama` has installed it: its weights in Q8_0, ours in int8."""
    beside(bench, LlamaCpp, "q8_0", INT8 or Precision.AUTO, {1: "1", 8: "1.5", 32: "1.5"})


def beside(bench: Bench, kind: type[Peer], dtype: str, precision: Precision, targets: dict[int, str]) -> None:
    """Tokens/s of ours in a precision and of a peer in its dtype, at every shape; `targets` by batch.

    Of the precision that both compute in, AUTO, this machine's bound is shown, too.
    """
    automatic = precision is Precision.AUTO
    peer = kind.start(transformer(bench.model.config), dtype, max(targets))
    if peer is None:
        return
    with peer:
        for length, batch in SHAPES:
            engine = bench.engine(batch, precision=precision, step_tokens=READ_AT_ONCE)
            ours = bench.batch(engine, batch, length)

            def theirs(batch: int = batch, length: int = length) -> float:
                return peer.measure(batch, length, NEW)["tokens_per_second"]

            own = precision.value if not automatic else str(FAST).removeprefix("torch.")
            what = f"{kind.name} {peer.described['version']} in {dtype}, ours in {own}, {length}+{NEW}, batch {batch}"
            bound = partial(rate_at_bound, bench.model.config, FAST, batch, length, NEW) if automatic else None
            bench.compare(what, ours, theirs, "tokens/s", targets[batch], rounds=3, bound=bound)


def hugging_face(bench: Bench, batch: int, length: int, dtype: torch.dtype, rounds: int = 3) -> None:
    config, kind = bench.model.config, str(dtype).removeprefix("torch.")
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

    ours = bench.batch(
        bench.engine(batch, precision=Precision.AUTO if dtype == FAST else Precision(kind)), batch, length
    )
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
