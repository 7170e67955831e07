"""Where and with what a replica computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from backpack_lm import processor
from backpack_lm.config import BackpackConfig
from backpack_lm.int8 import store
from backpack_lm.kernels import Caches, Device, Precision, choose, native
from backpack_lm.kernels.native import NativeKernels, NotBuilt
from backpack_lm.kernels.plain import PlainKernels

GPU = torch.cuda.is_available()


@pytest.fixture
def caches() -> Caches:
    config = BackpackConfig.gpt2(11, 8, 16, n_layer=1, n_head=2, num_senses=2)
    return Caches.empty(config, 1, torch.zeros(22, 16), torch.zeros(11, 16))


def test_cpu_is_cpu_and_auto_takes_a_gpu_where_there_is_one() -> None:
    assert Device("cpu").torch().type == "cpu"
    assert Device("auto").torch().type == ("cuda" if GPU else "cpu")


@pytest.mark.skipif(GPU, reason="there is one here")
def test_a_gpu_that_is_not_there_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"device is cuda, but torch .* finds no CUDA device; use cpu or auto"):
        Device("cuda").torch()


@pytest.mark.parametrize(("generation", "dtype"), [(7, torch.float32), (8, torch.bfloat16)])
def test_auto_is_bfloat16_on_a_gpu_that_multiplies_it_itself(
    generation: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=generation))
    assert Precision.AUTO.dtype("cuda") is dtype
    assert Precision.BFLOAT16.dtype("cuda") is torch.bfloat16


def test_a_cpu_gets_the_compiled_kernels_or_without_a_compiler_the_plain_ones(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(choose(caches), NativeKernels)

    def fails() -> None:
        raise NotBuilt("no compiler")

    monkeypatch.setattr(native, "library", fails)
    assert type(choose(caches)) is PlainKernels


def test_int8_is_for_a_cpu_only() -> None:
    assert Precision.INT8.dtype() is torch.int8
    with pytest.raises(ValueError, match="computed on a CPU only; use bfloat16, or device cpu"):
        Precision.INT8.dtype("cuda")


@pytest.mark.parametrize(("narrow", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_beside_int8_caches_are_what_auto_is(narrow: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: narrow)
    config = BackpackConfig.gpt2(11, 8, 16, n_layer=1, n_head=2, num_senses=2)
    caches = Caches.empty(config, 1, store(torch.zeros(22, 16), torch.int8), torch.zeros(11, 16))
    assert caches.dtype is caches.values.dtype is caches.sense_keys.dtype is caches.embedding.dtype is dtype
