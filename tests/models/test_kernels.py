"""The compiled kernels and torch's give the same numbers; the compiled ones the same bits in any company."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from backpack_lm import processor
from backpack_lm.config import BackpackConfig
from backpack_lm.int8 import quantise
from backpack_lm.kernels import (
    DrawParams,
    Kernels,
    MixSpan,
    StepInput,
    TokenSpan,
    build,
    choose,
    huge_pages,
    structs,
)
from backpack_lm.kernels.native import NativeKernels
from backpack_lm.kernels.native_trunk import NativeTrunk
from backpack_lm.kernels.noise import philox
from backpack_lm.kernels.plain import PlainKernels
from backpack_lm.kernels.products import GROUP, Product
from backpack_lm.kernels.trunk import CachedTrunk
from backpack_lm.model import Backpack, turns_of
from backpack_lm.trunks import Rotary
from torch import Tensor, nn

from tests.models.kernel_caches import SHAPES, SPANS, close, filled, llama, topics


@pytest.fixture(params=list(SHAPES))
def config(request: pytest.FixtureRequest) -> BackpackConfig:
    return SHAPES[request.param]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[False, True], ids=["whole", "int8"])
def int8(request: pytest.FixtureRequest) -> bool:
    """Whether weights and sense vectors are."""
    return request.param


def _both(config: BackpackConfig, dtype: torch.dtype, int8: bool = False) -> tuple[NativeKernels, PlainKernels]:
    return NativeKernels(filled(config, dtype, int8=int8)), PlainKernels(filled(config, dtype, int8=int8))


def test_attention(config: BackpackConfig, dtype: torch.dtype) -> None:
    native, plain = _both(config, dtype)
    qkv = torch.randn(24, config.trunk.layer.qkv_width).to(dtype)
    for layer in range(config.trunk.depth):
        close(native.attend(qkv, layer, SPANS, 0.2), plain.attend(qkv, layer, SPANS, 0.2), dtype)
    assert torch.equal(native.caches.values, plain.caches.values)
    assert torch.equal(native.caches.keys, plain.caches.keys)


@pytest.mark.parametrize(("heads", "groups", "width"), [(9, 3, 16), (4, 4, 20), (14, 2, 64), (10, 1, 8)])
@pytest.mark.parametrize("page_size", [16, 64])
def test_heads_of_a_group_share_keys_and_values(
    heads: int, groups: int, width: int, page_size: int, dtype: torch.dtype
) -> None:
    """Query head h reads head h // (H / G): as if each had keys and values of its own, which are the same; a token by
    itself to the last bit as in a chunk."""
    config = llama(50, heads * width, 1, heads, groups, num_senses=5)
    native, apart, plain = (
        make(filled(config, dtype, page_size=page_size)) for make in (NativeKernels, NativeKernels, PlainKernels)
    )
    qkv = torch.randn(24, (heads + 2 * groups) * width).to(dtype)
    found = native.attend(qkv, 0, SPANS, 0.2)
    close(found, plain.attend(qkv, 0, SPANS, 0.2), dtype)
    for span in SPANS:
        for n in range(span.size):
            one = apart.attend(qkv[span.token + n][None], 0, [TokenSpan(0, span.slot, span.position + n, 1)], 0.2)
            assert torch.equal(one[0], found[span.token + n])

    single = NativeKernels(
        filled(BackpackConfig.gpt2(50, 80, heads * width, 1, heads, num_senses=5), dtype, page_size=page_size)
    )
    caches, each = single.caches, heads // groups
    for slot in range(4):
        read = native.caches.read(0, torch.tensor([slot]), 80)
        keys, values = (part[0].repeat_interleave(each, 0) for part in read)
        caches.write(0, slot, 0, keys.permute(2, 0, 1), values.transpose(0, 1))
    q, kv = qkv.view(24, -1, width).split([heads, 2 * groups], 1)
    assert torch.equal(single.attend(torch.cat([q, kv.repeat_interleave(each, 1)], 1).flatten(1), 0, SPANS, 0.2), found)


@pytest.mark.parametrize("page_size", [32, 80, 160])
def test_where_pages_are_changes_no_bit(config: BackpackConfig, dtype: torch.dtype, page_size: int) -> None:
    """Pages of 16 in no order against larger ones, up to one for a whole slot."""
    small, large = (NativeKernels(filled(config, dtype, page_size=size)) for size in (16, page_size))
    qkv = torch.randn(24, config.trunk.layer.qkv_width).to(dtype)
    spans = [TokenSpan(0, 3, 33, 21), TokenSpan(21, 2, 69, 1)]  # of slots that share nothing
    assert torch.equal(small.attend(qkv, 0, spans, 0.2)[:22], large.attend(qkv, 0, spans, 0.2)[:22])
    queries = torch.randn(2, config.num_senses, config.sense_head_width).to(dtype)
    predictions = [MixSpan(2, 67, False), MixSpan(3, 37, False)]
    assert torch.equal(small.mix(queries, predictions), large.mix(queries, predictions))


def _predictions(config: BackpackConfig) -> list[MixSpan]:
    three = topics(config)
    return [
        MixSpan(0, 1, True),
        MixSpan(1, 65, True, three[:1]),
        MixSpan(2, 67, False, three),
        MixSpan(3, 37, True, three[1:]),
    ]


def _counted(config: BackpackConfig, *kernels: Kernels) -> list[MixSpan]:
    """Predictions whose tokens, but for a fresh one, are counted in the caches."""
    predictions = _predictions(config)
    for prediction in predictions:
        before = prediction._replace(length=prediction.length - prediction.fresh, fresh=False)
        for each in kernels:
            each.update_annealing(before, 0)
    return predictions


def test_the_mix_and_annealing(config: BackpackConfig, dtype: torch.dtype, int8: bool) -> None:
    native, plain = _both(config, dtype, int8)
    queries = torch.randn(4, config.num_senses, config.sense_head_width).to(dtype)
    predictions = _counted(config, native, plain)
    for _ in range(3):  # the second and third time on what the one before has left behind
        close(native.mix(queries, predictions), plain.mix(queries, predictions), dtype)
        predictions = [p._replace(length=p.length + 1, fresh=True) for p in predictions]


def test_counting_a_chunk_for_annealing(config: BackpackConfig, dtype: torch.dtype, int8: bool) -> None:
    """Cells whose multiplier can no longer change are left uncounted, so multipliers are compared."""
    native, plain = _both(config, dtype, int8)
    for start, length in ((0, 20), (20, 60)):
        prediction = MixSpan(1, length, False, topics(config))
        for kernels in (native, plain):
            kernels.update_annealing(prediction, start)
        found, wanted = PlainKernels(native.caches).multipliers(prediction), plain.multipliers(prediction)
        first = native.caches.previous[1, :length] < 0
        torch.testing.assert_close(found[first], wanted[first], rtol=1e-4, atol=1e-4)


def test_residual_and_norm(config: BackpackConfig, dtype: torch.dtype) -> None:
    native, plain = _both(config, dtype)
    norm = nn.LayerNorm(config.n_embd).requires_grad_(False)
    norm.weight.normal_(), norm.bias.normal_()
    x, delta = torch.randn(9, config.n_embd), torch.randn(9, config.n_embd).to(dtype)
    sums = {}
    for kernels in (native, plain):
        sums[kernels.name] = x.clone()
        first = kernels.residual_norm(sums[kernels.name], None, norm)
        second = kernels.residual_norm(sums[kernels.name], delta, norm)
        sums[kernels.name + "y"] = torch.stack([first, second])
    values = list(sums.values())
    assert torch.equal(values[0], values[2])
    close(values[1], values[3], dtype)


def test_root_mean_square_norm(config: BackpackConfig, dtype: torch.dtype) -> None:
    native, plain = _both(config, dtype)
    norm = nn.RMSNorm(config.n_embd, 1e-5).requires_grad_(False)
    norm.weight.normal_()
    x, delta = torch.randn(9, config.n_embd), torch.randn(9, config.n_embd).to(dtype)
    found, wanted = (kernels.residual_norm(x.clone(), delta, norm) for kernels in (native, plain))
    close(found, wanted, dtype)


@pytest.mark.parametrize(("heads", "groups", "width"), [(9, 3, 64), (3, 1, 20), (2, 2, 32)])
def test_heads_are_turned_in_place(heads: int, groups: int, width: int, dtype: torch.dtype) -> None:
    native, plain = _both(SHAPES["odd"], dtype)
    turns = turns_of(Rotary(100_000.0), range(80), width)
    positions, qkv = torch.tensor([0, 79, 13, 13, 40]), torch.randn(5, (heads + 2 * groups) * width).to(dtype)
    found, wanted = qkv.clone(), qkv.clone()
    native.rotate(found, positions, turns, heads + groups)
    plain.rotate(wanted, positions, turns, heads + groups)
    close(found, wanted, dtype)
    values = (heads + groups) * width
    assert torch.equal(found[:, values:], qkv[:, values:])
    lengths = (v.float().view(5, -1, width).norm(dim=-1) for v in (found, qkv))
    close(*lengths, dtype)


@pytest.mark.parametrize("inner", [1536, 50, 16])
def test_a_gate(inner: int, dtype: torch.dtype) -> None:
    native, plain = _both(SHAPES["odd"], dtype)
    wide = (torch.randn(7, 2 * inner) * 4).to(dtype)
    close(native.gate(wide), plain.gate(wide), dtype)


def test_matrix_products_and_head(config: BackpackConfig, dtype: torch.dtype, int8: bool) -> None:
    native, plain = _both(config, dtype, int8)
    weight, bias = torch.randn(133, config.n_embd), torch.randn(133)
    x = torch.randn(11, config.n_embd)
    x[3] = 0.0
    for gelu, int16_inputs in ((False, False), (True, False), (False, True)):
        ours, definition = (kernels.linear(weight, bias, gelu, int16_inputs) for kernels in (native, plain))
        close(ours(x.to(dtype)), definition(x.to(dtype)), dtype)
    for rows in (1, 5, 8, 11):
        logits = native.head(weight)(x[:rows])
        assert logits.dtype is torch.float32
        close(logits, plain.head(weight)(x[:rows]), dtype)


def test_the_same_bits_alone_and_in_any_company(config: BackpackConfig, dtype: torch.dtype, int8: bool) -> None:
    """Row by row, and a prompt token by token, against all at once."""
    together, apart = NativeKernels(filled(config, dtype, int8)), NativeKernels(filled(config, dtype, int8))
    qkv = torch.randn(24, config.trunk.layer.qkv_width).to(dtype)
    whole = together.attend(qkv, 0, SPANS, 0.2)
    for span in SPANS:
        for n in range(span.size):
            one = apart.attend(qkv[span.token + n][None], 0, [TokenSpan(0, span.slot, span.position + n, 1)], 0.2)
            assert torch.equal(one[0], whole[span.token + n])
    queries = torch.randn(4, config.num_senses, config.sense_head_width).to(dtype)
    predictions = _counted(config, together, apart)
    mixed = together.mix(queries, predictions)
    for n, prediction in enumerate(predictions):
        assert torch.equal(apart.mix(queries[n : n + 1], [prediction])[0], mixed[n])
    weight, bias, x = torch.randn(33, config.n_embd), torch.randn(33), torch.randn(90, config.n_embd)
    linear, head = together.linear(weight, bias, gelu=True), together.head(weight)
    products, logits = linear(x.to(dtype)), head(x)
    for rows in (1, 2, 7, 33, 71):
        assert torch.equal(linear(x[:rows].to(dtype)), products[:rows])
        assert torch.equal(head(x[:rows]), logits[:rows])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_no_finite_logits_come_of_an_output_that_is_no_number(wrong: float, dtype: torch.dtype, int8: bool) -> None:
    """In int8 it would be a whole number like others."""
    config = SHAPES["of the published kind"]
    native, plain = _both(config, dtype, int8)
    o = torch.randn(3, config.n_embd)
    o[1, 70] = wrong
    for kernels in (native, plain):
        logits = kernels.head(torch.randn(60, config.n_embd))(o)
        assert not logits[1].isfinite().any()
        assert bool(logits[[0, 2]].isfinite().all())


def test_new_tokens_are_appended_and_linked(config: BackpackConfig) -> None:
    """A text in two parts over another one, as slots are used again."""
    native, plain = _both(config, torch.float32)
    ids = torch.arange(37) ** 2 % 11
    for span in (TokenSpan(0, 1, 0, 20), TokenSpan(0, 1, 20, 17)):
        positions = torch.arange(span.position, span.position + span.size)
        tokens = ids[positions]
        rows = (tokens[:, None] * config.num_senses + torch.arange(config.num_senses)).int()
        for kernels in (native, plain):
            kernels.append_tokens(StepInput(tokens, torch.ones_like(tokens), positions, rows), [span])
    assert torch.equal(native.caches.ids, plain.caches.ids)
    assert torch.equal(native.caches.rows, plain.caches.rows)
    text = ids.tolist()
    before = [max((t for t in range(at) if text[t] == text[at]), default=-1) for at in range(37)]
    after = [min((t for t in range(at + 1, 37) if text[t] == text[at]), default=0) for at in range(37)]
    assert native.caches.previous[1, :37].tolist() == before
    assert native.caches.following[1, :37].tolist() == after


def test_the_trunk_in_one_call_is_its_operations(
    config: BackpackConfig, dtype: torch.dtype, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, whatever it computes and caches; on a processor with AMX with the library's products too."""
    monkeypatch.setattr(processor, "onednn_packs_bfloat16", lambda: False)
    torch.manual_seed(4)
    model = Backpack(config).eval().requires_grad_(False)
    one, other = NativeKernels(filled(config, dtype, int8=int8)), NativeKernels(filled(config, dtype, int8=int8))
    whole, steps = one.trunk(model), CachedTrunk(other, model)
    assert isinstance(whole, NativeTrunk)
    slots = torch.tensor([span.slot for span in SPANS for _ in range(span.size)])
    positions = torch.cat([torch.arange(span.position, span.position + span.size) for span in SPANS])
    tokens = torch.randint(0, config.vocab_size, slots.shape)
    new = StepInput(tokens, slots, positions, torch.empty(0))
    assert torch.equal(whole(new, SPANS), steps(new, SPANS))
    for tensor in ("keys", "values", "sense_keys"):
        assert torch.equal(getattr(one.caches, tensor), getattr(other.caches, tensor))
    assert bool((whole.seconds > 0).all())


@pytest.mark.parametrize("width", [16, 15])
def test_a_model_of_odd_width_has_no_whole_trunk_in_bfloat16_and_one_of_even_width_has(
    width: int, dtype: torch.dtype, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library reads pairs of bfloat16; a product of another number of inputs is filled up. Of int8, inputs are
    filled up as they are quantised."""
    monkeypatch.setattr(processor, "onednn_packs_bfloat16", lambda: False)
    config = BackpackConfig.gpt2(11, 16, width, n_layer=1, n_head=1, num_senses=3)
    model, kernels = Backpack(config).eval().requires_grad_(False), NativeKernels(filled(config, dtype, int8))
    assert isinstance(kernels.trunk(model), NativeTrunk) is (dtype is torch.float32 or width == 16 or int8)
    x, weight, bias = torch.randn(5, width), torch.randn(7, width), torch.randn(7)
    plain = PlainKernels(filled(config, dtype, int8=int8))
    close(kernels.linear(weight, bias)(x.to(dtype)), plain.linear(weight, bias)(x.to(dtype)), dtype)


def test_the_fastest_way_is_chosen_that_the_processor_has(dtype: torch.dtype) -> None:
    """By what torch reports of the processor, and by no function of ours: the trunk in one call is skipped only where
    oneDNN multiplies bfloat16 with AMX."""
    config, has = SHAPES["of the published kind"], torch.cpu.get_capabilities()
    amx = bool(has.get("amx_tile") and has.get("amx_bf16")) and "ONEDNN_MAX_CPU_ISA" not in os.environ
    kernels = choose(filled(config, dtype))
    assert isinstance(kernels, NativeKernels)
    expected = CachedTrunk if amx and dtype is torch.bfloat16 else NativeTrunk
    assert type(kernels.trunk(Backpack(config).eval().requires_grad_(False))) is expected


def test_a_mistake_in_the_trunk_is_not_taken_for_a_processor_that_lacks_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It selected the slow path, without a word."""

    def fail(self: NativeTrunk, *_: object) -> None:
        raise AttributeError("a mistake of ours")

    config = SHAPES["of the published kind"]
    monkeypatch.setattr(NativeTrunk, "__init__", fail)
    with pytest.raises(AttributeError, match="a mistake of ours"):
        NativeKernels(filled(config, torch.float32)).trunk(Backpack(config))


def test_a_copied_page_is_the_same_as_far_as_it_is_copied(config: BackpackConfig) -> None:
    caches = filled(config, torch.float32, page_size=32)
    donor, page = (int(caches.page_table[slot, 1]) for slot in (2, 3))
    caches.copy_page(donor, page, 21)
    slots = torch.tensor([2, 3])
    for layer in range(config.trunk.depth):
        keys, values = caches.read(layer, slots, 53)
        assert torch.equal(keys[0, ..., 32:], keys[1, ..., 32:])
        assert torch.equal(values[0, :, 32:], values[1, :, 32:])
    sense_keys = caches.read_sense_keys(slots, 53)
    assert torch.equal(sense_keys[0, ..., 32:], sense_keys[1, ..., 32:])


def in_blocks(weight: Tensor) -> Tensor:
    """The oracle of `pack_int8`: a weight [out, in] as [out/48, in/64, 3264] uint8."""
    rows = F.pad(weight, (0, 0, 0, -len(weight) % GROUP))
    whole, scales = quantise(rows.unflatten(0, (-1, GROUP)))  # [G, 48, B, 64], [G, 48, B]
    weights = (whole + 128).to(torch.uint8).unflatten(-1, (-1, 4)).permute(0, 2, 3, 1, 4)
    return torch.cat([scales.mT.contiguous().view(torch.uint8), weights.flatten(2)], -1)


@pytest.mark.parametrize(("outer", "inner"), [(48, 64), (1, 1), (49, 65), (300, 192), (100, 577)])
def test_weights_are_packed_as_they_are_quantised(outer: int, inner: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(outer, inner) * torch.logspace(-20, 3, outer)[:, None]
    weight[outer // 2] = 0
    weight[0, : inner // 2] = torch.arange(inner // 2) - 0.5  # halves, which round to the even number
    for given in (weight, weight.t().contiguous().t(), weight.bfloat16()):
        room, bias = huge_pages.Room(), torch.zeros(outer)
        packed = Product.int8(build.library(), given, bias, False, False, torch.float32, room).packed
        assert torch.equal(packed, in_blocks(given.float()))


def test_memory_in_huge_pages_is_memory() -> None:
    made = huge_pages.zeros(3, huge_pages.HUGE, dtype=torch.bfloat16)
    assert made.shape == (3, huge_pages.HUGE)
    assert not made.any()
    made[2] = 1
    assert made.sum(1).tolist() == [0, 0, huge_pages.HUGE]


def test_memory_of_long_slots_is_there_when_it_is_used() -> None:
    before = psutil.Process().memory_info().rss
    made = huge_pages.zeros(64, huge_pages.HUGE, dtype=torch.uint8, at_once=False)
    assert psutil.Process().memory_info().rss - before < 0.1 * made.numel()
    assert not made[::9, ::4096].any()


def test_memory_in_huge_pages_is_there_before_it_is_used() -> None:
    """Made when a slot is used first, they kept its first token waiting for 0.15 s."""
    before = psutil.Process().memory_info().rss
    made = huge_pages.zeros(64, huge_pages.HUGE, dtype=torch.uint8)
    made[1] = 3
    for _ in range(1000):  # beside whoever goes on
        if taken := psutil.Process().memory_info().rss - before > 0.9 * made.numel():
            break
        time.sleep(0.01)
    assert taken
    assert made.sum().item() == 3 * huge_pages.HUGE


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells")
def test_memory_in_huge_pages_is_private() -> None:
    """Of shared memory, Linux makes them only where somebody has switched that on."""
    made = huge_pages.zeros(3, huge_pages.HUGE, dtype=torch.bfloat16)
    areas = re.findall("^([0-9a-f]+)-([0-9a-f]+) (....)", Path("/proc/self/maps").read_text(), re.M)
    holding = [access for start, end, access in areas if int(start, 16) <= made.data_ptr() < int(end, 16)]
    assert holding == ["rw-p"]


def test_a_kernel_without_huge_pages_gives_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert not huge_pages.zeros(3, huge_pages.HUGE, dtype=torch.bfloat16).any()


def test_noise_is_philox() -> None:
    """Known answers of the authors' Random123 library (kat_vectors: philox4x32-10)."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox(zero, zero, zero, zero)[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_drawing_is_one_function_of_seed_position_and_token(config: BackpackConfig) -> None:
    native, plain = _both(config, torch.float32)
    logits = torch.randn(40, 1000)
    draw = Random(1)
    how = [
        DrawParams(
            0.0 if n % 5 == 0 else draw.random() + 0.1,
            draw.getrandbits(64),
            draw.randrange(512),
            draw.choice((0, 0, 200)),
            draw.choice((1.0, 0.95)),
        )
        for n in range(40)
    ]
    drawn = native.draw(logits, how)
    assert torch.equal(drawn.long(), plain.draw(logits, how))
    assert len(set(drawn.tolist())) > 30


def test_log_probabilities(config: BackpackConfig) -> None:
    native, plain = _both(config, torch.float32)
    logits, chosen = torch.randn(5, 1003) * 3, [0, 7, 1002, 31, 500]
    own, tokens, logs = native.log_probabilities(logits, chosen, 4)
    expected, likeliest, their_logs = plain.log_probabilities(logits, chosen, 4)
    assert tokens.tolist() == likeliest.tolist()
    torch.testing.assert_close(own, expected.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(logs, their_logs.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(structs.LAYOUTS))
def test_a_field_that_only_python_has_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the structure has padding, too, in which a field more doesn't change its size."""
    known = structs.LAYOUTS[name]
    if isinstance(known, np.dtype):
        kind, at, *_ = known.fields["temperature" if name == "DrawParams" else known.names[-1]]
        fields = {n: (k, o) for n, (k, o, *_) in known.fields.items()} | {"added": (np.dtype("i4"), at + kind.itemsize)}
        names = list(fields)
        spec = {"names": names, "formats": [fields[n][0] for n in names], "offsets": [fields[n][1] for n in names]}
        longer: object = np.dtype(spec)
    else:
        longer = type(name, (ctypes.Structure,), {"_fields_": (*known._fields_, ("added", ctypes.c_int))})
    monkeypatch.setattr(structs, "LAYOUTS", {**structs.LAYOUTS, name: longer})
    with pytest.raises(structs.LayoutMismatch, match=f"^{name} is .*added 4 B"):
        build.library.__wrapped__()


@pytest.fixture
def changed_sources(tmp_path: Path) -> Callable[[str, str, str], subprocess.CompletedProcess[str]]:
    """Compiles what the library says of its layouts, with a replacement in one file, to tmp_path/changed.so."""

    def compile_changed(file: str, old: str, new: str) -> subprocess.CompletedProcess[str]:
        sources = tmp_path / "cpp"
        shutil.copytree(build.SOURCES, sources, dirs_exist_ok=True)
        text = (sources / file).read_text("utf-8")
        assert text.count(old) == 1
        (sources / file).write_text(text.replace(old, new), "utf-8")
        (sources / "only.cpp").write_text(
            '#include "layouts.h"\n'
            'extern "C" const char* layouts() { static const std::string text = all_layouts(); return text.c_str(); }\n'
        )
        options = [*processor.compiler_options(), "-std=c++17", "-w", "-O0", "-fPIC", "-shared"]
        command = ["g++", *options, str(sources / "only.cpp"), "-o", str(tmp_path / "changed.so")]
        return subprocess.run(command, capture_output=True, text=True)

    return compile_changed


def test_a_field_that_only_the_library_has_is_refused(
    changed_sources: Callable[[str, str, str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """A field of another kind: the names are the same, the places aren't."""
    done = changed_sources("draw.h", "int32_t position, top_k;", "int64_t position; int32_t top_k;")
    assert done.returncode == 0, done.stderr
    with pytest.raises(structs.LayoutMismatch, match=r"^DrawParams is .* but .*position 8 B at 16"):
        structs.check_layouts(ctypes.CDLL(str(tmp_path / "changed.so")))


def test_a_field_that_the_library_does_not_report_does_not_compile(
    changed_sources: Callable[[str, str, str], subprocess.CompletedProcess[str]],
) -> None:
    done = changed_sources("draw.h", "float temperature;", "float temperature, min_p;")
    assert "only 5 names provided" in done.stderr


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:1024] + bytes(len(whole) - 1024)])
def test_a_damaged_library_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """And isn't loaded: that would end the process, as would one that is cut off."""
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    whole = Path(build.library()._name).read_bytes()
    monkeypatch.setattr(build, "folder", lambda name: tmp_path)
    monkeypatch.setattr(build, "_compile_library", lambda file, options: file.write_bytes(whole))
    build._path().write_bytes(damage(whole))
    assert build.library.__wrapped__().draw_float32
    assert build._path().read_bytes() == whole


def test_without_a_compiler_the_plain_kernels_do_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    monkeypatch.setattr(build, "folder", lambda name: tmp_path)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.NotBuilt, match="install g\\+\\+"):
        build.library.__wrapped__()


def test_a_folder_that_cannot_be_written_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "PREBUILT", tmp_path)

    def refuse(name: str) -> Path:
        raise PermissionError(f"{name} can't be made")

    monkeypatch.setattr(build, "folder", refuse)
    with pytest.raises(build.NotBuilt, match="can't be made"):
        build.library.__wrapped__()


def test_a_compiler_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cpp"
    broken.mkdir()
    (broken / "exports.cpp").write_text("int main( {")
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    monkeypatch.setattr(build, "folder", lambda name: tmp_path)
    monkeypatch.setattr(build, "SOURCES", broken)
    with pytest.raises(build.NotBuilt, match="error"):
        build.library.__wrapped__()
