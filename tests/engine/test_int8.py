"""int8: what is served is what is explained, and ordinary text is predicted about as well as in bfloat16."""

from __future__ import annotations

import math

import pytest
import torch
from backpack_lm.installed import folder_of, missing
from backpack_lm.int8 import restore
from backpack_lm.kernels import Caches, MixSpan, Precision, StepInput, TokenSpan, choose
from backpack_lm.model import Backpack
from backpack_lm.ordinary_text import plain, shipped
from backpack_lm.overlay import Overlay, SenseTable
from backpack_serving.engine.runner import Runner
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.settings import DEFAULT_MODEL
from torch import Tensor

from tests.engine.conftest import EDITS, K, V, compiled
from tests.engine.test_company import off_the_oracle

LENGTH, ROWS, TOGETHER = 256, 16, 64


@pytest.fixture(scope="module")
def small(table: SenseTable, model: Backpack) -> SenseTable:
    """The tiny model's, as a replica of int8 has it."""
    return model.table_of(table.with_room(0, torch.int8).view(V, K, -1))


@pytest.fixture(scope="module")
def release_of(small: SenseTable) -> dict[str, Overlay]:
    return {name: compiled(edits, small) for name, edits in EDITS.items()}


def test_a_release_is_explained_by_the_vectors_that_are_served(
    model: Backpack, small: SenseTable, release_of: dict[str, Overlay]
) -> None:
    runner = Runner(model, small.with_room(4 * V * K), 1)
    for overlay in release_of.values():
        runner.load(overlay, 3)
        start = V * K + 3
        assert torch.equal(restore(runner.table[start : start + len(overlay.rows)]), overlay.rows)
    assert torch.equal(restore(runner.table[: V * K]).view(V, K, -1), small.vectors(slice(None)))


def test_a_scaled_and_a_copied_vector_are_exact(small: SenseTable, release_of: dict[str, Overlay]) -> None:
    scaled, copied = release_of["scale"], release_of["copy"]
    token = torch.tensor([7])
    torch.testing.assert_close(
        scaled.replace(token, small.vectors(token))[0, 1], -2 * small.vectors(token)[0, 1], rtol=1e-6, atol=0
    )
    source = torch.tensor([9])
    torch.testing.assert_close(
        copied.replace(token + 10, small.vectors(token + 10))[0, 3], small.vectors(source)[0, 0], rtol=1e-6, atol=0
    )


def test_int8_stays_close_to_the_oracle(
    model: Backpack, small: SenseTable, release_of: dict[str, Overlay], overlays: dict[str, Overlay]
) -> None:
    """Of the same text, under every release: log-probabilities within 0.3 of float32's, 0.04 on average."""
    off = off_the_oracle(torch.int8, model, small, release_of, overlays)
    assert max(off) < 0.3
    assert sum(off) / len(off) < 0.04


def _perplexity(served: ServedModel, table: Tensor, rows: Tensor) -> float:
    """Of rows [N, LENGTH] of ids, by the fastest kernels."""
    model, config = served.model, served.manifest.config
    caches = Caches.empty(config, TOGETHER, table, model.embedding.detach(), context=LENGTH)
    caches.page_table[0] = torch.arange(caches.page_table.shape[1])
    kernels = choose(caches)
    trunk, head, total = kernels.trunk(model), kernels.head(model.embedding[: config.tokens]), 0.0
    spans, positions = [TokenSpan(0, 0, 0, LENGTH)], torch.arange(LENGTH)
    for ids in rows:
        senses = (ids[:, None] * config.num_senses + torch.arange(config.num_senses)).int()
        new = StepInput(ids, torch.zeros_like(ids), positions, senses)
        kernels.append_tokens(new, spans)
        queries = trunk(new, spans)
        for start in range(0, LENGTH - 1, TOGETHER):
            end = min(start + TOGETHER, LENGTH - 1)
            predictions = [MixSpan(0, at + 1, False) for at in range(start, end)]
            logs = head(kernels.mix(queries[start:end].contiguous(), predictions)).log_softmax(-1)
            total -= float(logs.gather(1, ids[start + 1 : end + 1, None]).double().sum())
    return math.exp(total / (len(rows) * (LENGTH - 1)))


@torch.inference_mode()
def test_held_out_perplexity_is_within_half_a_percent_of_bfloat16s() -> None:
    served = ServedModel.read(folder_of("micro"), Precision.INT8)
    assert served.storage.dtype is torch.int8
    ids = torch.tensor(served.tokenizer.encode(plain(shipped(folder_of("micro")))[: 8 * LENGTH * ROWS]))
    rows = ids[: LENGTH * ROWS].view(ROWS, LENGTH)
    rounded = served.model.sense_table().with_room(0, torch.bfloat16)
    ours, theirs = (_perplexity(served, table, rows) for table in (served.storage, rounded))
    assert ours / theirs < 1.005


@pytest.mark.slow
@torch.inference_mode()
def test_held_out_perplexity_of_the_default_model_is_within_half_a_percent_of_float32s() -> None:
    """Which is served in int8 unless somebody says otherwise. Its sense table is int8 in both."""
    folder = folder_of(DEFAULT_MODEL)
    if missing(folder):
        pytest.skip(f"the default model isn't installed here: backpack model install {DEFAULT_MODEL}")
    found = []
    for precision in (Precision.INT8, Precision.FLOAT32):
        served = ServedModel.read(folder, precision)
        ids = torch.tensor(served.tokenizer.encode(plain(shipped(folder))[: 8 * LENGTH * ROWS]))
        found.append(_perplexity(served, served.storage, ids[: LENGTH * ROWS].view(ROWS, LENGTH)))
    assert found[0] / found[1] < 1.005
