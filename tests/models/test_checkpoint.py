"""Every published layout, held equal to the independent implementation in pyvene, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backpack_lm import checkpoint, mapped_table
from backpack_lm.checkpoint import CheckpointError, from_tensors, load, load_table, save, verify
from backpack_lm.config import MICRO, MINI, SMALL, BackpackConfig, ConfigError
from backpack_lm.manifest import Manifest, ManifestError
from backpack_lm.model import Backpack
from backpack_serving.cli.main import app
from backpack_serving.inference.served_model import ServedModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

TINY = BackpackConfig.gpt2(vocab_size=64, n_positions=24, n_embd=24, n_layer=3, n_head=4, num_senses=5)

State = dict[str, Tensor]
LAYOUTS = ("hugging face", "lightning", "levanter")


def _independent(config: BackpackConfig) -> Any:
    """pyvene's Backpack with random weights, in the published activation and with eager attention."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pyvene.models.backpack_gpt2.modelings_backpack_gpt2 import (
            BackpackGPT2Config,
            BackpackGPT2LMHeadModel,
        )
    values = config.to_json()
    values.pop("architectures")
    # Its `tie_weights` takes no arguments, which transformers 5 gives; the weights are tied by hand below.
    BackpackGPT2LMHeadModel.tie_weights = lambda self, **_: None
    theirs = BackpackGPT2LMHeadModel(BackpackGPT2Config(**values, attn_implementation="eager"))
    theirs.lm_head.weight = theirs.backpack.gpt2_model.wte.weight
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn_like(parameter) * (0.3 if config.n_embd < 100 else 0.05)
            parameter.copy_(noise + (1.0 if ".ln" in name and name.endswith("weight") else 0.0))
    return theirs.eval()


def lightning_names(state: State, layers: int) -> State:
    """Rename by hand, from what Stanford's modules are called, not by the reader's own table."""
    out: State = {}

    def put(name: str, source: str, transpose: bool = False) -> None:
        for part in ("weight", "bias"):
            value = state[f"backpack.{source}.{part}"]
            out[f"model.transformer.{name}.{part}"] = value.t() if transpose and part == "weight" else value

    words, places = state["backpack.gpt2_model.wte.weight"], state["backpack.gpt2_model.wpe.weight"]
    for owner in ("gpt2_model.embeddings", "content_model.embeddings", "embeddings"):
        out[f"model.transformer.{owner}.word_embeddings.weight"] = words
        out[f"model.transformer.{owner}.position_embeddings.weight"] = places
    out["model.lm_head.weight"] = words
    put("gpt2_model.ln_0", "gpt2_model.h.0.ln_1")
    for i in range(layers):
        here = f"gpt2_model.layers.{i}"
        put(f"{here}.mixer.Wqkv", f"gpt2_model.h.{i}.attn.c_attn", transpose=True)
        put(f"{here}.mixer.out_proj", f"gpt2_model.h.{i}.attn.c_proj", transpose=True)
        put(f"{here}.norm1", f"gpt2_model.h.{i}.ln_2")
        put(f"{here}.mlp.fc1", f"gpt2_model.h.{i}.mlp.c_fc", transpose=True)
        put(f"{here}.mlp.fc2", f"gpt2_model.h.{i}.mlp.c_proj", transpose=True)
        last = i == layers - 1
        put(f"{here}.norm2", "gpt2_model.ln_f" if last else f"gpt2_model.h.{i + 1}.ln_1")
    put("content_model.ln_0", "sense_network.ln")
    for n in (1, 2):
        put(f"content_model.layers.0.norm{n}", f"sense_network.block.ln_{n}")
    for n, name in ((1, "c_fc"), (2, "c_proj")):
        put(f"content_model.layers.0.mlp.fc{n}", f"sense_network.block.mlp.{name}", transpose=True)
        put(f"content_model.final_mlp.fc{n}", f"sense_network.final_mlp.{name}", transpose=True)
    put("contextualization_attn.Wqkv", "sense_weight_net.c_attn")
    return out


def _lay_out(layout: str, theirs: Any, config: BackpackConfig, folder: Path) -> float:
    """Write a checkpoint folder in a layout; what its logits are multiplied by."""
    values = config.to_json()
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    if layout == "hugging face":
        mask = torch.ones(1, 1, config.n_positions, config.n_positions, dtype=torch.bool)
        state["backpack.gpt2_model.h.0.attn.bias"] = mask.tril()
        torch.save(state, folder / "pytorch_model.bin")
    elif layout == "lightning":
        values["num_content_vectors"] = values.pop("num_senses")
        torch.save({"state_dict": lightning_names(state, config.trunk.depth), "epoch": 3}, folder / "last.ckpt")
    else:
        values |= {"model_type": "backpack-gpt2", "architectures": "BackpackLMHeadModel"}
        bare = {name.removeprefix("backpack."): tensor for name, tensor in state.items()}
        save_file({name: tensor.contiguous() for name, tensor in bare.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return 1 / config.num_senses if layout == "levanter" else 1.0


@pytest.fixture(scope="module", params=[TINY, SMALL], ids=["tiny", "small"])
def independent(request: pytest.FixtureRequest) -> tuple[BackpackConfig, Any]:
    return request.param, _independent(request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_the_independent_implementation(
    independent: tuple[BackpackConfig, Any], layout: str, tmp_path: Path
) -> None:
    config, theirs = independent
    factor = _lay_out(layout, theirs, config, tmp_path)
    ours = load(tmp_path)
    ids = torch.randint(config.vocab_size, (2, min(24, config.n_positions)))
    with torch.no_grad():
        position_ids = torch.arange(ids.shape[1])[None].expand_as(ids)
        expected = theirs(ids, position_ids=position_ids).logits * factor
        got = ours(ids)
    difference = float((got - expected).abs().max())
    print(f"{layout}, d = {config.n_embd}: largest difference {difference:.2e} of {float(expected.abs().max()):.3g}")
    assert expected.std() > 0.1, "a test on logits that are all alike would prove nothing"
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("config", "parameters"), [(MICRO, 41_659_776), (MINI, 103_856_000), (SMALL, 170_083_584)])
def test_published_parameter_counts(config: BackpackConfig, parameters: int) -> None:
    with torch.device("meta"):
        model = Backpack(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.fixture
def state() -> State:
    torch.manual_seed(0)
    return {f"backpack.{name}": tensor for name, tensor in Backpack(TINY).state_dict().items()}


def test_inner_widths_of_the_ablation_models_are_read_from_the_shapes() -> None:
    config = BackpackConfig(**{**_fields(TINY), "sense_inner": (24, 24)})
    model = Backpack(config)
    read = from_tensors(model.state_dict(), TINY.to_json())
    assert read.config.sense_mlp_widths == (24, 24)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(read(ids), model(ids))


def _fields(config: BackpackConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__slots__}


Damage = Callable[[State], None]
WTE, MLP = "backpack.gpt2_model.wte.weight", "backpack.gpt2_model.h.1.mlp.c_fc.weight"


def _two_missing(state: State) -> None:
    del state[MLP], state["backpack.sense_weight_net.c_attn.bias"]


@pytest.mark.parametrize(
    ("damage", "complaints"),
    [
        (_two_missing, ["missing: gpt2_model.h.1.mlp.c_fc.weight", "missing: sense_weight_net.c_attn.bias"]),
        (lambda s: s.update({"backpack.extra": torch.ones(2), "more": torch.ones(1)}), ["unknown: extra", "more"]),
        (lambda s: s.update({MLP: torch.ones(24, 95)}), ["shape of gpt2_model.h.1.mlp.c_fc.weight: [24, 95]"]),
        (lambda s: s[MLP][0].fill_(float("nan")), ["not finite: gpt2_model.h.1.mlp.c_fc.weight"]),
        (lambda s: s.update({MLP: s[MLP].to(torch.int64)}), ["type of gpt2_model.h.1.mlp.c_fc.weight"]),
        (lambda s: s.update({MLP: s[MLP].double() * 1e300}), ["not finite: gpt2_model.h.1.mlp.c_fc.weight"]),
        (lambda s: s.update({"lm_head.weight": s[WTE] + 1}), ["lm_head.weight should be the same tensor"]),
    ],
    ids=["missing", "unknown", "shape", "nan", "integer", "beyond float32", "untied"],
)
def test_a_damaged_checkpoint_is_refused_by_name(state: State, damage: Damage, complaints: list[str]) -> None:
    damage(state)
    with pytest.raises(CheckpointError) as refused:
        from_tensors(state, TINY.to_json())
    for complaint in complaints:
        assert complaint in str(refused.value)


def test_nanobackpack_and_gpt2_are_refused_with_the_reason(state: State) -> None:
    with pytest.raises(CheckpointError, match="another architecture"):
        from_tensors({"backpack.contextualization_layer.c_attn.weight": torch.ones(2)}, TINY.to_json())
    gpt2 = {f"transformer.h.0.{name}": torch.ones(2) for name in ("ln_1.weight", "attn.c_attn.weight")}
    with pytest.raises(CheckpointError, match="GPT-2"):
        from_tensors(gpt2, TINY.to_json())
    with pytest.raises(ConfigError, match="not a Backpack"):
        from_tensors(state, {k: v for k, v in TINY.to_json().items() if k != "num_senses"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_embd", "24"),
        ("n_head", 4.0),
        ("n_layer", None),
        ("num_tokens", 65),
        ("num_tokens", 0),
        ("eos_token_id", 64),
        ("scale_attn_weights", False),
    ],
)
def test_a_config_that_no_model_can_have_is_refused_by_name(state: State, field: str, value: object) -> None:
    """Ids beyond the vocabulary would be looked up beyond the embedding."""
    with pytest.raises(ConfigError, match=f"{field} is {value!r}"):
        from_tensors(state, {**TINY.to_json(), field: value})


@pytest.mark.parametrize(
    "odd",
    [{MLP: 3}, {3: torch.ones(1)}, {MLP: torch.ones(24, 96).to_sparse()}],
    ids=["number", "nameless", "sparse"],
)
def test_a_pickle_of_other_things_than_tensors_is_refused(
    state: State, odd: dict[object, object], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_json()))
    torch.save({**state, **odd}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="dense tensors by name"):
        load(tmp_path)


def test_which_of_several_checkpoints_is_meant_is_not_guessed(state: State, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_json()))
    for name in ("step-100.ckpt", "step-99.ckpt"):
        torch.save({"state_dict": state}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"step-100\.ckpt, step-99\.ckpt"):
        load(tmp_path)


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="isn't an object"):
        load(tmp_path)


def test_nothing_in_a_pickle_is_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"state_dict": Bomb()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_json()))
    with pytest.raises(CheckpointError, match="can't be read"):
        load(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tmp_path / "given.json"
    tokenizer.write_text("{}")
    save(Backpack(TINY), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_is_in_the_hugging_face_layout_and_comes_back(folder: Path) -> None:
    torch.manual_seed(0)
    ids, model = torch.tensor([[1, 2, 3]]), Backpack(TINY)
    names = set(load_file(folder / "model.safetensors"))
    assert "backpack.gpt2_model.h.0.attn.c_attn.weight" in names
    assert not any("lm_head" in name for name in names)
    torch.testing.assert_close(load(folder)(ids), model(ids))
    table = load_table(folder, model, Manifest.read(folder))
    torch.testing.assert_close(table.peaks, model.sense_table().peaks)


def test_all_files_of_a_saved_model_are_for_the_same_people(folder: Path) -> None:
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_the_fingerprint_covers_config_tokenizer_and_every_weight(folder: Path) -> None:
    fingerprints = {verify(folder).fingerprint}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-6}))
    fingerprints.add(checkpoint.fingerprint(folder))
    (folder / "tokenizer.json").write_text("{ }")
    fingerprints.add(checkpoint.fingerprint(folder))
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    fingerprints.add(checkpoint.fingerprint(folder))
    assert len(fingerprints) == 4
    with pytest.raises(CheckpointError, match="changed or damaged"):
        verify(folder)


def test_a_replica_serves_no_other_weights_than_those_of_the_fingerprint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And leaves no table of them under that name, which all others would map, after the repair too."""
    monkeypatch.setattr(mapped_table, "folder", lambda name: tmp_path)
    file = folder / checkpoint.WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="changed or damaged"):
        ServedModel.read(folder)
    result = CliRunner().invoke(app, ["model", "prepare", str(folder), "--precision", "float32"])
    assert result.exit_code == 1
    assert "changed or damaged" in result.stderr
    assert not list(tmp_path.glob("*.float32*"))


def test_a_manifest_that_tells_of_another_shape_is_no_manifest_of_these_files(folder: Path) -> None:
    """Gateways would take texts for it that replicas can't read."""
    manifest = Manifest.read(folder)
    Manifest(
        manifest.fingerprint,
        replace(manifest.config, trunk=replace(manifest.config.trunk, context=512)),
        manifest.sense_rms,
    ).write(folder)
    with pytest.raises(CheckpointError, match=r"config\.json says .*context=24,.*context=512"):
        verify(folder)


@pytest.mark.parametrize("norms", [[1.0], [float("nan")] * 5, [-1.0] * 5], ids=str)
def test_norms_that_are_none_are_refused(folder: Path, norms: list[float]) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**values, "sense_rms": norms}))
    with pytest.raises(ManifestError, match="not the norms of 5 senses"):
        Manifest.read(folder)


@pytest.mark.parametrize("file", ["config.json", "manifest.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", '{"config": 5}'], ids=["deep", "list", "odd"])
def test_a_json_file_of_another_kind_is_named(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises((CheckpointError, ManifestError), match=file.replace(".", r"\.")):
        verify(folder)
    if file == "config.json":
        with pytest.raises((CheckpointError, ConfigError)):
            load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 2**62),
        ("n_layer", 10**9),
        ("n_head", True),
        ("sense_intermediate_scale", -1),
        ("sense_inner", [1]),
        ("sense_inner", 5),
        ("layer_norm_epsilon", "small"),
        ("layer_norm_epsilon", float("nan")),
        ("scale_attn_by_inverse_layer_idx", "no"),
    ],
)
def test_a_value_that_no_backpack_has_is_named(folder: Path, name: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ConfigError, match=f"{name} is "):
        load(folder)


def test_what_is_served_are_the_weights_of_the_fingerprint(folder: Path) -> None:
    """Whatever other safetensors somebody keeps there."""
    before = load(folder).embedding
    save_file({WTE: before + 1}, folder / "zeroed.safetensors")
    assert torch.equal(load(folder).embedding, before)


def test_damaged_denominators_are_refused_and_those_of_nobody_not_used(folder: Path) -> None:
    save_file({"peaks": torch.ones(1)}, folder / checkpoint.TOPICS)
    assert "peaks" not in load_table(folder, load(folder), Manifest.read(folder)).__dict__
    (folder / checkpoint.TOPICS).write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="import the model again"):
        load_table(folder, load(folder), Manifest.read(folder))


@pytest.mark.parametrize(
    "peaks", [torch.ones(3, 2), torch.ones(64, 5, dtype=torch.int64), torch.full((64, 5), float("nan"))], ids=str
)
def test_denominators_that_are_none_are_refused(folder: Path, peaks: Tensor) -> None:
    metadata = {"fingerprint": Manifest.read(folder).fingerprint}
    save_file({"peaks": peaks}, folder / checkpoint.TOPICS, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"not a number for each of \[64, 5\] cells; import the model again"):
        load_table(folder, load(folder), Manifest.read(folder))


def test_denominators_of_another_model_are_not_used(folder: Path) -> None:
    manifest = Manifest.read(folder)
    Manifest("00" * 32, manifest.config, manifest.sense_rms).write(folder)
    assert "peaks" not in load_table(folder, load(folder), Manifest.read(folder)).__dict__


def test_a_folder_without_a_model_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="backpack model import"):
        Manifest.read(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_json()))
    with pytest.raises(CheckpointError, match="has no"):
        load(tmp_path)
