"""The parts of ranks are the model: what they compute adds up to what it computes, and nothing is in two of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from backpack_lm.checkpoint import load_part, load_senses, save
from backpack_lm.config import BackpackConfig, ConfigError, StoredSenses
from backpack_lm.installed import folder_of
from backpack_lm.manifest import TOKENIZER
from backpack_lm.model import Attention, Backpack, turns_of
from backpack_lm.overlay import Overlay
from backpack_lm.patch import AddEdit, BiasEdit, Cell, ReleaseContent, RevisionContent, TopicEdit, Vector
from backpack_lm.sharding import CutConv1D, Shard, check_ranks, fitting_ranks

from tests.models.trunk_shapes import FAMILIES, random_model

SHARED = [(name, n) for name, config in FAMILIES.items() for n in fitting_ranks(config) if n > 1]


def _parts(model: Backpack, ranks: int) -> list[Backpack]:
    tensors = model.state_dict()
    return [Shard(rank, ranks).part(model.config, tensors.__getitem__) for rank in range(ranks)]


def _tensors_of(part: Backpack) -> dict[str, torch.Tensor]:
    """All that it has, with what is cut when it is read."""
    cut = {
        f"{path}.{kind}": tensor
        for path, module in part.named_modules()
        if isinstance(module, CutConv1D)
        for kind, tensor in (("weight", module.weight), ("bias", module.bias))
        if tensor is not None
    }
    return {**cut, **{name: tensor for name, tensor in part.state_dict().items() if tensor.device.type != "meta"}}


def test_some_of_each_family_are_shared() -> None:
    assert {name.split(",")[0] for name, _ in SHARED} == {"gpt2", "llama", "qwen2"}
    assert {n for _, n in SHARED} == {2, 4}


@pytest.mark.parametrize(("name", "ranks"), SHARED)
def test_parts_add_up_to_the_model(name: str, ranks: int) -> None:
    model = random_model(FAMILIES[name])
    config, parts = model.config, _parts(model, ranks)
    layer, x = config.trunk.layer, torch.randn(1, 7, config.n_embd)
    turns = config.trunk.rotary and turns_of(config.trunk.rotary, range(7), layer.head_width)
    for number, block in enumerate(model.gpt2_model.h):
        for whole, each in (
            (block.attn(x, turns), [part.gpt2_model.h[number].attn(x, turns) for part in parts]),
            (block.mlp(x), [part.gpt2_model.h[number].mlp(x) for part in parts]),
        ):
            torch.testing.assert_close(sum(each), whole, atol=2e-5, rtol=0)
    states = list(model.gpt2_model.states(torch.tensor([[5, 17, 60, 33, 2, 8, 9]])))
    whole = model.sense_weight_net.query_key(states)
    for one, each in zip(
        whole, zip(*(part.sense_weight_net.query_key(states) for part in parts), strict=True), strict=True
    ):
        torch.testing.assert_close(torch.cat(each, 2), one)


@pytest.mark.parametrize(("name", "ranks"), SHARED)
def test_every_sense_and_token_is_one_ranks(name: str, ranks: int) -> None:
    config, shards = FAMILIES[name], [Shard(rank, ranks) for rank in range(ranks)]
    assert [s for shard in shards for s in shard.senses(config)] == list(range(config.num_senses))
    assert [t for shard in shards for t in shard.vocabulary(config)] == list(range(config.tokens))


@pytest.mark.parametrize(("name", "ranks"), SHARED)
def test_a_part_is_what_it_says_and_no_more(name: str, ranks: int) -> None:
    """Of what is shared; norms, embeddings and, where ranks outnumber them, key/value heads are everybody's."""
    model = random_model(FAMILIES[name])
    layer = model.config.trunk.layer
    for part in _parts(model, ranks):
        attention = part.gpt2_model.h[0].attn
        assert isinstance(attention, Attention)
        assert attention.shape.heads * ranks == layer.heads
        assert attention.shape.kv_heads == max(1, layer.kv_heads // ranks)
        assert part.config.num_senses * ranks == model.config.num_senses
        own = [p for n, p in _tensors_of(part).items() if ".mlp." in n or "sense_w" in n]
        all_ = [p for n, p in model.state_dict().items() if ".mlp." in n or "sense_w" in n]
        assert sum(p.numel() for p in own) < 1.2 * sum(p.numel() for p in all_) / ranks + 400  # biases


@pytest.mark.parametrize("senses", StoredSenses)
@pytest.mark.parametrize("name", ["gpt2", "llama, untied, wide heads, scaled", "qwen2, all states"])
def test_a_part_is_read_from_a_folder(name: str, senses: StoredSenses, tmp_path: Path) -> None:
    config = replace(FAMILIES[name], senses=senses)
    model = random_model(config)
    save(model, folder_of("micro") / TOKENIZER, tmp_path)
    for rank in range(2):
        shard = Shard(rank, 2)
        there, here = (
            _tensors_of(part)
            for part in (load_part(tmp_path, shard), shard.part(config, model.state_dict().__getitem__))
        )
        assert there.keys() == here.keys()
        assert "gpt2_model.h.0.mlp.c_fc.weight" in here
        for name, tensor in here.items():
            assert torch.equal(there[name], tensor), name
    alone, ids = load_senses(tmp_path), torch.arange(config.vocab_size)
    assert torch.equal(alone.compute_senses(ids), model.compute_senses(ids))
    assert {parameter.device.type for parameter in alone.gpt2_model.h.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("heads", "groups", "senses", "fitting"), [(9, 3, 16, [1]), (8, 2, 16, [1, 2, 4, 8]), (6, 6, 8, [1, 2])]
)
def test_other_numbers_of_ranks_are_refused_with_those_that_fit(
    heads: int, groups: int, senses: int, fitting: list[int]
) -> None:
    config = BackpackConfig.from_json(
        {
            "model_type": "llama",
            "vocab_size": 97,
            "hidden_size": 72,
            "intermediate_size": 50,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": 8,
            "num_senses": senses,
        }
    )
    assert fitting_ranks(config) == fitting
    for ranks in fitting:
        check_ranks(config, ranks)
    with pytest.raises(ConfigError, match=rf"^5 ranks can't share .* can: {', '.join(map(str, fitting))}$"):
        check_ranks(config, 5)
    with pytest.raises(ConfigError, match="can't share"):
        Shard(0, 5).part(config, lambda name: pytest.fail("read"))


def test_an_overlays_parts_are_the_overlay() -> None:
    model = random_model(FAMILIES["gpt2"])
    table, d = model.sense_table(), model.config.n_embd
    edits = (
        *(AddEdit((Cell(t, t % 3),), Vector.of([t / 100] * d)) for t in range(5, 60, 2)),  # none of sense 3
        TopicEdit((11, 12), 3),
        BiasEdit((7,), 2.0),
    )
    whole = Overlay.compile(ReleaseContent((RevisionContent("00" * 32, edits),)), table)
    ids = torch.arange(model.config.vocab_size)
    parts = [whole.of_senses(Shard(rank, 4).senses(model.config)) for rank in range(4)]
    assert sum(len(part.rows) for part in parts) == len(whole.rows)
    assert not len(parts[3].rows)
    for sense, part in enumerate(parts):
        senses = torch.zeros(1, len(ids), 4, d)
        expected = whole.replace(ids[None], senses)[:, :, [sense]]
        assert torch.equal(part.replace(ids[None], senses[:, :, [sense]]), expected)
        assert torch.equal(part.topics[0].targets(ids), whole.topics[0].targets(ids)[:, [sense]])
        assert (part.digest, part.bias) == (whole.digest, whole.bias)


def test_the_shares_of_inner_units_are_whole_blocks_of_int8_where_there_are_enough() -> None:
    for ranks, inner in product((2, 4), (1536, 4096, 11008)):
        shape = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "num_senses": 8}
        config = BackpackConfig.from_json({"model_type": "llama", "intermediate_size": inner, **shape})
        own = [Shard(rank, ranks).config(config).trunk.layer.inner for rank in range(ranks)]
        assert sum(own) == inner
        assert not any(units % 64 for units in own)
        assert max(own) - min(own) <= 64
