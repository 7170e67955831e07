"""Which files of a folder are its weights: shards and their indexes, and what must never be served mixed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backpack_lm.checkpoint import CheckpointError, from_tensors, load, save, verify
from backpack_lm.config import BackpackConfig, ConfigError
from backpack_lm.installed import folder_of
from backpack_lm.lab.twin import read_twin
from backpack_lm.layouts import to_hugging_face
from backpack_lm.manifest import Manifest
from backpack_lm.model import Backpack
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.weight_files import read_safetensors, read_weights, write_safetensors
from backpack_serving.auth.keys import ApiKeySecret
from backpack_serving.cli.main import app
from backpack_serving.gateway import bootstrap as gateway
from backpack_serving.interventions import bootstrap as interventions
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

TINY = BackpackConfig.gpt2(vocab_size=64, n_positions=24, n_embd=24, n_layer=3, n_head=4, num_senses=5)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 340168784\n"
KINDS = {"safetensors": ("model", "model.safetensors"), "bin": ("pytorch_model", "pytorch_model.bin")}

State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    torch.manual_seed(0)
    return {f"backpack.{name}": tensor for name, tensor in Backpack(TINY).state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/config.json").write_text(json.dumps(TINY.to_json()))
    return tmp_path / "there"


def _write(tensors: State, file: Path) -> None:
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)


def _shards(state: State, folder: Path, kind: str, of: int = 2) -> dict[str, str]:
    """Write shards as transformers names them; the weight map of their index."""
    names = sorted(state)
    weight_map = {}
    for at in range(of):
        file = f"{KINDS[kind][0]}-{at + 1:05d}-of-{of:05d}.{kind}"
        part = {name: state[name].clone() for name in names[at::of]}
        _write(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    return weight_map


def _index(weight_map: object, folder: Path, kind: str) -> Path:
    file = folder / f"{KINDS[kind][1]}.index.json"
    file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return file


def _is(found: Backpack, state: State) -> bool:
    return all(torch.equal(found.state_dict()[name.removeprefix("backpack.")], t) for name, t in state.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("indexed", [True, False])
def test_shards_are_read(state: State, folder: Path, kind: str, indexed: bool) -> None:
    weight_map = _shards(state, folder, kind)
    if indexed:
        _index(weight_map, folder, kind)
    assert _is(load(folder), state)


@pytest.mark.parametrize("kind", KINDS)
def test_stale_shards_beside_the_indexed_ones_are_not_read(state: State, folder: Path, kind: str) -> None:
    weight_map = _shards(state, folder, kind)
    _shards({name: tensor + 1 for name, tensor in state.items()}, folder, kind, of=3)
    _write({name: tensor + 2 for name, tensor in state.items()}, folder / f"z.{kind}")
    index = _index(weight_map, folder, kind)
    assert _is(load(folder), state)
    index.unlink()
    with pytest.raises(CheckpointError, match=rf"00001-of-00002\.{kind} and .*of-00003\.{kind} .* both have backpack"):
        load(folder)


def test_an_unfinished_set_of_shards_is_told(state: State, folder: Path) -> None:
    _shards(state, folder, "safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks shard 2 of the 2 of model"):
        load(folder)


def _outside(folder: Path) -> str:
    (folder / "model-00001-of-00002.safetensors").rename(folder.parent / "outside.safetensors")
    return str(folder.parent / "outside.safetensors")


def _link(folder: Path) -> str:
    (folder / "link.safetensors").symlink_to(_outside(folder))
    return "link.safetensors"


ODD_INDEXES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda _: "model-00009-of-00009.safetensors", "which is missing"),
    "folder": (lambda folder: (folder / "d.safetensors").mkdir() or "d.safetensors", "which is missing"),
    "above": (lambda folder: "../" + Path(_outside(folder)).name, "outside of"),
    "absolute": (_outside, "outside of"),
    "round about": (lambda folder: f"../{folder.name}/model-00001-of-00002.safetensors", "outside of"),
    "link": (_link, "outside of"),
    "null": (lambda _: "a\0.safetensors", "which is missing"),
    "long": (lambda _: "a" * 5000 + ".safetensors", "which is missing"),
    "pickle": (lambda _: "config.json", r"should name \*\.safetensors"),
    "number": (lambda _: 3, "no index of weights"),
}


@pytest.mark.parametrize("odd", ODD_INDEXES)
def test_an_index_that_names_what_it_must_not_is_refused(state: State, folder: Path, odd: str) -> None:
    weight_map: dict[str, Any] = dict(_shards(state, folder, "safetensors"))
    name, reason = ODD_INDEXES[odd]
    first = min(weight_map)
    weight_map[first] = name(folder)
    _index(weight_map, folder, "safetensors")
    with pytest.raises(CheckpointError, match=rf"(?s)model\.safetensors\.index\.json.*{reason}"):
        load(folder)


def test_an_index_of_other_files_is_refused(state: State, folder: Path) -> None:
    weight_map = _shards(state, folder, "safetensors")
    index = _index({**weight_map, "backpack.more": "model-00001-of-00002.safetensors"}, folder, "safetensors")
    with pytest.raises(CheckpointError, match=r"backpack\.more is in model-00001-of-00002\.safetensors, but it isn't"):
        load(folder)
    left_out = weight_map.pop(min(weight_map))
    _index(weight_map, folder, "safetensors")
    with pytest.raises(CheckpointError, match=rf"{left_out} has {min(state)}, which {index.name} doesn't put there"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no index of weights"):
        load(folder)
    index.write_text('{"weight_map": {"a": "b", "a": "c"}}')
    with pytest.raises(CheckpointError, match="'a' stands twice"):
        load(folder)


def test_a_whole_checkpoint_beside_an_index_of_another_is_refused(state: State, folder: Path) -> None:
    weight_map = _shards(state, folder, "safetensors")
    _index(weight_map, folder, "safetensors")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="leave the checkpoint that is meant"):
        load(folder)
    _index(dict.fromkeys(state, "model.safetensors"), folder, "safetensors")
    assert _is(load(folder), state)


def test_hugging_faces_cache_is_read_through_its_links(state: State, tmp_path: Path) -> None:
    """Its snapshots are links to blobs, which lie outside of them."""
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    _index(_shards(state, snapshot, "safetensors"), snapshot, "safetensors")
    (snapshot / "config.json").write_text(json.dumps(TINY.to_json()))
    for at, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(at))
        file.symlink_to(f"../../blobs/{at}")
    assert _is(load(snapshot), state)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "last.ckpt", "config.json"])
def test_a_file_that_git_lfs_did_not_fetch_is_named_as_such(state: State, folder: Path, name: str) -> None:
    (folder / name).write_bytes(LFS)
    with pytest.raises(CheckpointError, match=rf"{name}.* is a git-lfs pointer.*git lfs pull"):
        load(folder)


def test_equal_names_in_one_safetensors_file_are_refused(folder: Path) -> None:
    one = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"a":{one},"a":{one}}}'.encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read: its header: 'a' stands twice"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "last.ckpt"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.95])
def test_a_file_that_is_cut_off_is_refused_in_our_words(state: State, folder: Path, name: str, keep: float) -> None:
    _write(state, folder / name)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(CheckpointError, match=name) as refused:
        load(folder)
    assert "weights_only" not in str(refused.value)
    if name == "model.safetensors":
        with pytest.raises(CheckpointError, match="no Transformer to compare with"):
            read_twin(folder, TINY)


def test_wrappers_of_training_are_no_part_of_a_name(state: State) -> None:
    for wrapped in ("module.{}", "_orig_mod.{}", "model.module.{}", "module._orig_mod.{}"):
        renamed = {wrapped.format(name): tensor for name, tensor in state.items()}
        assert _is(from_tensors(renamed, TINY.to_json()), state)
    inner = {name.replace("gpt2_model.", "gpt2_model._orig_mod."): tensor for name, tensor in state.items()}
    assert _is(from_tensors(inner, TINY.to_json()), state)


def test_two_tensors_that_get_one_name_are_refused(state: State) -> None:
    name = "backpack.gpt2_model.ln_f.bias"
    with pytest.raises(CheckpointError, match=r"ln_f\.bias and module\.backpack.* are both gpt2_model\.ln_f\.bias"):
        to_hugging_face({**state, f"module.{name}": state[name] + 1})
    assert _is(from_tensors({**state, f"module.{name}": state[name].clone()}, TINY.to_json()), state)


def test_a_gpt2_without_a_prefix_is_told_to_be_one() -> None:
    with pytest.raises(CheckpointError, match="GPT-2 checkpoint"):
        to_hugging_face({"wte.weight": torch.ones(2, 2), "h.0.ln_1.weight": torch.ones(2)})


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_approx"])
def test_one_activation_has_many_names(name: str) -> None:
    assert BackpackConfig.from_json({**TINY.to_json(), "activation_function": name}) == TINY
    with pytest.raises(ConfigError, match="'gelu'; a Backpack uses 'gelu_new'"):
        BackpackConfig.from_json({**TINY.to_json(), "activation_function": "gelu"})


def test_the_end_of_text_that_transformers_writes_for_nobody_is_none() -> None:
    assert BackpackConfig.from_json({**TINY.to_json(), "eos_token_id": 50256}).eos_token_id is None
    large = {**TINY.to_json(), "vocab_size": 50257, "eos_token_id": 50256}
    assert BackpackConfig.from_json(large).eos_token_id == 50256
    with pytest.raises(ConfigError, match="eos_token_id is 50255"):
        BackpackConfig.from_json({**TINY.to_json(), "eos_token_id": 50255})


def test_what_is_cheap_is_checked_before_weights_are_read(folder: Path, tmp_path: Path) -> None:
    """The weights here can't be read: whoever gets to them says so."""
    (folder / "model.safetensors").write_bytes(b"no weights")
    tokenizer = folder_of("micro") / "tokenizer.json"
    for arguments, reason in (
        ([], "tokenizer.json is not there: give the model's tokenizer.json with --tokenizer"),
        (["--tokenizer", str(folder / "config.json")], "config.json is not a tokenizer"),
        (["--tokenizer", str(tokenizer), "--config", str(tmp_path / "none")], "none is not there"),
        (["--tokenizer", str(tokenizer), "--heads", "3"], "says n_head 4, --heads 3"),
        (["--tokenizer", str(tokenizer)], "the tokenizer has 16384 tokens, the model 64"),
    ):
        done = CliRunner().invoke(app, ["model", "import", str(folder), str(tmp_path / "out"), *arguments])
        assert done.exit_code == 1
        assert reason in done.stderr.replace("\n", "")
        assert "model.safetensors" not in done.stderr
    assert not (tmp_path / "out").exists()


async def test_a_tokenizer_that_was_exchanged_is_refused_by_who_reads_no_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save(Backpack(TINY), folder_of("micro") / "tokenizer.json", tmp_path / "model")
    manifest, file = Manifest.read(tmp_path / "model"), tmp_path / "model/tokenizer.json"
    assert Tokenizer.read(file, manifest.tokenizer).vocab_size == 16384
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError, match=r"tokenizer\.json has SHA-256 .* the manifest beside it says"):
        Tokenizer.read(file, manifest.tokenizer)
    settings = Settings(model=tmp_path / "model", state=tmp_path / "state", service_key=str(ApiKeySecret.mint()))
    for start in (gateway.start, interventions.start):
        with pytest.raises(ValueError, match=r"tokenizer\.json has SHA-256 .*import the model again"):
            await start(settings, Metrics())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json isn't its manifest's"):
        verify(tmp_path / "model")
    values = json.loads((tmp_path / "model/manifest.json").read_text())
    del values["tokenizer"]  # as earlier versions wrote it
    (tmp_path / "model/manifest.json").write_text(json.dumps(values))
    assert Tokenizer.read(file, Manifest.read(tmp_path / "model").tokenizer).vocab_size == 16384


def test_a_file_alone_is_a_checkpoint_too(state: State, folder: Path) -> None:
    torch.save(state, folder / "some.bin")
    assert read_weights(folder / "some.bin").keys() == state.keys()
    assert _is(load(folder / "some.bin"), state)
    with pytest.raises(CheckpointError, match="is not there"):
        read_weights(folder / "none")


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    tensors = {
        "b": torch.randn(3, 5, generator=draw),
        "a": torch.randn(7, generator=draw).to(torch.bfloat16),
        "turned": torch.randn(4, 6, generator=draw).t(),
        "none": torch.empty(0, 3),
        "half": torch.randn(2, 2, 2, generator=draw).half(),
        "one": torch.tensor(2.5),
    }
    write_safetensors(tmp_path / "w.safetensors", tensors)
    read = load_file(tmp_path / "w.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    assert all(map(torch.equal, read_safetensors(tmp_path / "w.safetensors").values(), read.values()))
    with pytest.raises(ValueError, match=r"ids is torch\.int64"):
        write_safetensors(tmp_path / "i.safetensors", {"ids": torch.zeros(2, dtype=torch.int64)})
