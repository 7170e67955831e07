"""Triton's kernels give the plain ones' numbers: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from random import Random

import pytest
import torch
from backpack_lm.config import BackpackConfig
from backpack_lm.kernels import Caches, DrawParams, Kernels, MixSpan, TokenSpan
from backpack_lm.kernels.build import NotBuilt
from backpack_lm.kernels.cuda import CudaKernels
from backpack_lm.kernels.plain import PlainKernels

from tests.models.kernel_caches import SPANS, close, filled, llama
from tests.models.test_kernels import _predictions

pytest.importorskip("triton", reason="Triton isn't installed; it is for Linux")

# Few senses: the interpreter takes them one by one.
SMALL = {
    "whole vectors": BackpackConfig.gpt2(60, 80, 64, n_layer=1, n_head=2, num_senses=4),
    "odd": BackpackConfig.gpt2(50, 70, 60, n_layer=1, n_head=3, num_senses=5),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=list(SMALL))
def config(request: pytest.FixtureRequest) -> BackpackConfig:
    return SMALL[request.param]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def _caches(config: BackpackConfig, dtype: torch.dtype) -> Caches:
    on_host = filled(config, dtype)
    return Caches(*(getattr(on_host, field.name).to(DEVICE) for field in fields(Caches)))


def _both(config: BackpackConfig, dtype: torch.dtype) -> tuple[CudaKernels, PlainKernels]:
    return CudaKernels(_caches(config, dtype)), PlainKernels(_caches(config, dtype))


def _steered(config: BackpackConfig, *kernels: Kernels) -> list[MixSpan]:
    """With no topic, one, three, two, of lengths from 1 on; all tokens but fresh ones are counted already."""
    predictions = [p._replace(topics=tuple(t.to(DEVICE) for t in p.topics)) for p in _predictions(config)]
    for p in predictions:
        for each in kernels:
            each.update_annealing(p._replace(length=p.length - p.fresh, fresh=False), 0)
    return predictions


def _queries(config: BackpackConfig, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, config.num_senses, config.sense_head_width).to(DEVICE, dtype)


def test_attention_of_single_tokens_and_of_chunks(config: BackpackConfig, dtype: torch.dtype) -> None:
    triton, plain = _both(config, dtype)
    qkv = torch.randn(24, 3 * config.n_embd).to(DEVICE, dtype)
    for layer in range(config.trunk.depth):
        close(triton.attend(qkv, layer, SPANS, 0.2), plain.attend(qkv, layer, SPANS, 0.2), dtype)
    assert torch.equal(triton.caches.values, plain.caches.values)
    assert torch.equal(triton.caches.keys, plain.caches.keys)


@pytest.mark.parametrize(("heads", "groups", "width"), [(9, 3, 16), (4, 4, 20), (14, 2, 8)])
def test_heads_of_a_group_share_keys_and_values(heads: int, groups: int, width: int, dtype: torch.dtype) -> None:
    config = llama(50, heads * width, 1, heads, groups, num_senses=5)
    triton, plain = _both(config, dtype)
    qkv = torch.randn(24, (heads + 2 * groups) * width).to(DEVICE, dtype)
    close(triton.attend(qkv, 0, SPANS, 0.2), plain.attend(qkv, 0, SPANS, 0.2), dtype)
    assert torch.equal(triton.caches.values, plain.caches.values)
    assert torch.equal(triton.caches.keys, plain.caches.keys)


def test_the_mix_over_topics_edited_rows_and_ragged_lengths(config: BackpackConfig, dtype: torch.dtype) -> None:
    triton, plain = _both(config, dtype)
    queries, steered = _queries(config, dtype), _steered(config, triton, plain)
    for _ in range(2):  # the second time on the annealing that the first has left behind
        close(triton.mix(queries, steered), plain.mix(queries, steered), dtype)
        steered = [p._replace(length=p.length + 1, fresh=True) for p in steered]


def test_annealing_is_counted_alike(config: BackpackConfig) -> None:
    """What is left uncounted are new cells whose multiplier can't change: so multipliers are compared."""
    triton, plain = _both(config, torch.float32)
    for prediction in _steered(config, triton, plain):
        if prediction.topics:
            triton.mix(_queries(config, torch.float32)[:1], [prediction])
            plain.mix(_queries(config, torch.float32)[:1], [prediction])
            counted = PlainKernels(triton.caches).multipliers(prediction)
            torch.testing.assert_close(counted, plain.multipliers(prediction), rtol=1e-4, atol=1e-4)


def test_the_same_bits_alone_and_in_company(config: BackpackConfig, dtype: torch.dtype) -> None:
    together, apart = CudaKernels(_caches(config, dtype)), CudaKernels(_caches(config, dtype))
    qkv = torch.randn(24, 3 * config.n_embd).to(DEVICE, dtype)
    whole = together.attend(qkv, 0, SPANS, 0.2)
    for span in (span for span in SPANS if span.size == 1):
        alone = apart.attend(qkv[span.token][None], 0, [TokenSpan(0, span.slot, span.position, 1)], 0.2)
        assert torch.equal(alone[0], whole[span.token])
    queries, steered = _queries(config, dtype), _steered(config, together, apart)
    mixed = together.mix(queries, steered)
    for n, prediction in enumerate(steered):
        assert torch.equal(apart.mix(queries[n : n + 1], [prediction])[0], mixed[n])


def test_drawing_is_the_same_function() -> None:
    """Of all tokens and of the likeliest, in a vocabulary that is no whole number of a program's steps."""
    triton, plain = _both(SMALL["odd"], torch.float32)
    logits = 3 * torch.randn(48, 2500, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits[:, 60:900:7] = float("-inf")
    logits[5] = logits[6, 2499] = float("nan")
    logits[7, 0], logits[8] = float("inf"), float("-inf")
    logits[9, 40] = logits[9, 77] = 100.0
    draw = Random(1)
    ways = ((0, 1.0), (40, 1.0), (0, 0.9), (300, 0.5))
    how = [
        DrawParams((0.0, 0.3, 1.0, 4.0)[n // 4 % 4], draw.getrandbits(64), draw.randrange(512), *ways[n % 4])
        for n in range(48)
    ]
    for rows in ([n for n in range(48) if n % 4 == 0], list(range(48))):  # no row truncates; three in four do
        some, ways_of_some = logits[rows], [how[n] for n in rows]
        drawn = triton.draw(some, ways_of_some)
        assert torch.equal(drawn, plain.draw(some, ways_of_some))
        assert len(set(drawn.tolist())) > len(rows) * 2 / 3


@pytest.mark.skipif(DEVICE.type == "cuda", reason="compiled kernels do reach this device")
def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(NotBuilt, match="the caches are on cpu"):
        CudaKernels(_caches(SMALL["odd"], torch.float32))


def test_without_triton_the_plain_kernels_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(NotBuilt, match="install triton"):
        CudaKernels(_caches(SMALL["odd"], torch.float32))


def test_kernels_compile_for_gpus_that_this_machine_lacks() -> None:
    """To machine code by NVIDIA's assembler, which comes with Triton; for an A100 and an H100, in both dtypes."""
    script, environment = Path(__file__).with_name("triton_compile.py"), {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = done.stdout.splitlines()
    assert len(built) == 5 * 2 * 2, done.stdout
    assert all("spills 0" in line for line in built), done.stdout
