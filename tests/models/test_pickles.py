"""Checkpoints as others' programs pickle them, and pickles that are attacks: nothing of either is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from backpack_lm.checkpoint import CheckpointError, derived_config, load
from backpack_lm.manifest import Manifest
from backpack_lm.pickle_machine import BadPickle, Inert, StoredTensor, unpickle
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.weight_files import read_file
from backpack_serving.cli.main import app
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from typer.testing import CliRunner

from tests.models.lightning_file import CONFIG, FILE, state

WRITTEN = state()


def _is_theirs(folder: Path, **how: Any) -> bool:
    found = load(folder, **how).state_dict()
    return all(torch.equal(found[name.removeprefix("backpack.")], tensor) for name, tensor in WRITTEN.items())


def test_lightnings_own_file_with_omegaconfs_objects_is_read() -> None:
    """Torch refuses it, and advises to execute what it holds."""
    with pytest.raises(pickle.UnpicklingError, match="omegaconf"):
        torch.load(FILE, weights_only=True)
    assert _is_theirs(FILE, heads=2)
    assert load(FILE, heads=2).config == CONFIG


def test_its_config_can_be_given_or_lie_beside_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_bytes(FILE.read_bytes())
    with pytest.raises(CheckpointError, match=r"config\.json is not there: .*--config, or, .*--heads"):
        load(tmp_path)
    values = CONFIG.to_json()
    values["num_content_vectors"] = values.pop("num_senses")
    (tmp_path / "given.json").write_text(json.dumps(values))
    assert _is_theirs(tmp_path, config=tmp_path / "given.json")
    (tmp_path / "given.json").rename(tmp_path / "config.json")
    assert _is_theirs(tmp_path)
    assert _is_theirs(checkpoint)
    with pytest.raises(CheckpointError, match="says n_head 2, --heads 1; leave out --heads"):
        load(checkpoint, heads=1)


def test_only_stanfords_layout_does_without_a_config() -> None:
    with pytest.raises(CheckpointError, match=r"summed or averaged. Give --config"):
        derived_config(WRITTEN, 2)
    tensors = read_file(FILE)
    assert derived_config(tensors, 2)["num_senses"] == CONFIG.num_senses
    del tensors["model._orig_mod.transformer.gpt2_model.embeddings.position_embeddings.weight"]
    left = {name: tensor for name, tensor in tensors.items() if "position_embeddings" not in name}
    with pytest.raises(CheckpointError, match=r"missing or misshapen: 'gpt2_model\.wpe\.weight'"):
        derived_config(left, 2)


def test_a_lightning_file_becomes_a_servable_folder(tmp_path: Path) -> None:
    letters = {letter: at for at, letter in enumerate("abcdefghi")}
    tokenizer = HFTokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    arguments = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--heads", "2"]
    done = CliRunner().invoke(app, ["model", "import", str(FILE), str(tmp_path / "out"), *arguments])
    assert done.exit_code == 0, done.stderr
    assert Manifest.read(tmp_path / "out").config == CONFIG
    assert _is_theirs(tmp_path / "out")
    assert Tokenizer.read(tmp_path / "out/tokenizer.json").vocab_size == CONFIG.vocab_size


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_tensors_are_what_torch_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    written: dict[str, Any] = {
        "whole": whole,
        "view": whole[1:, 2:],
        "turned": whole.t(),
        "empty": whole[:0],
        "number": whole[3, 3],
        "parameter": torch.nn.Parameter(whole, requires_grad=False),
    }
    torch.save({"state_dict": written, "optimizer_states": [{"exp_avg": torch.ones(3)}]}, tmp_path / "a.ckpt")
    found = read_file(tmp_path / "a.ckpt")
    assert list(found) == list(written)
    for name, tensor in written.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == dtype
    assert found["whole"].data_ptr() == found["turned"].data_ptr(), "a shared storage is read once"


def test_what_torch_wrote_before_its_archives_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert read_file(tmp_path / "old.bin")["a"].tolist() == [0, 1, 2]


# ---- attacks


def _archive(file: Path, program: bytes, data: bytes = bytes(16), compress: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compress) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", data)
    return file


class _Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


STORAGE = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI%d\ntQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"I%d\n%s%sI00\nNtR"


def _stored(count: int = 4, offset: int = 0, shape: bytes = b"(I4\nt", stride: bytes = b"(I1\nt") -> bytes:
    """A program that makes {"a": tensor}."""
    return b"(dS'a'\n" + TENSOR % (count, offset, shape, stride) + b"s."


TOUCH = "open(%r, 'w')"
ATTACKS = {
    "os.system": lambda mark: pickle.dumps(_Calls(os.system, f"touch {mark}")),
    "builtins.eval": lambda mark: pickle.dumps(_Calls(eval, TOUCH % mark)),
    "builtins.exec": lambda mark: pickle.dumps({"state_dict": _Calls(exec, TOUCH % mark)}),
    "builtins.open": lambda mark: pickle.dumps([_Calls(open, mark, "w")], protocol=4),
    "in the hyper-parameters": lambda mark: pickle.dumps({"state_dict": {}, "h": [_Calls(os.system, f"touch {mark}")]}),
    "by protocol 0": lambda mark: b"cposix\nsystem\n(S'touch %s'\ntR." % mark.encode(),
    "INST": lambda mark: b"(S'touch %s'\niposix\nsystem\n." % mark.encode(),
    "OBJ": lambda mark: b"(cos\nsystem\nS'touch %s'\no." % mark.encode(),
    "a submodule": lambda mark: b"cimportlib.machinery\nSourceFileLoader\n(S'x'\nS'%s'\ntR." % mark.encode(),
    "getattr": lambda mark: b"cbuiltins\ngetattr\n(cos\nS'system'\ntR(S'touch %s'\ntR." % mark.encode(),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_by_what_they_name(attack: str, tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    file = _archive(tmp_path / "pytorch_model.bin", ATTACKS[attack](str(mark)))
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin can't be read: .* Python would call .*nothing was"
    ) as e:
        read_file(file)
    assert "weights_only" not in str(e.value)
    assert not mark.exists()


def test_even_what_no_list_of_ours_names_is_inert(tmp_path: Path) -> None:
    """The list is a courtesy: with or without it, nothing is imported or called."""
    (tmp_path / "evil.py").write_text("raise SystemExit")
    for program in (
        b"cevil\nf\n(tR.",
        b"c__main__\nx\n(S'__class__'\ntR.",
        pickle.dumps(_Calls(Path.touch, tmp_path / "exploded")),
        b"cfunctools\npartial\n(cshelve\nopen\nS'x'\ntR(tR.",
    ):
        assert isinstance(unpickle(program), Inert)
    assert not (tmp_path / "exploded").exists()


def test_state_is_given_to_nothing() -> None:
    """BUILD, with a dict, with slots, and of `__setstate__`, on what is inert, a dict, a list and a class."""
    slots = b"(N(dS'__class__'\nS'x'\nS'name'\nS'y'\nst"
    for owner in (
        b"cevil\nf\n",
        b"cevil\nf\n(tR",
        b"(d",
        b"(l",
        b"ccollections\nOrderedDict\n(tR",
        b"cevil\nC\n)\x81",
    ):
        for built in (b"(dS'__setstate__'\ncevil\ng\ns", slots, b"cevil\nh\n"):
            found = unpickle(owner + built + b"b.")
            assert found in (Inert("evil.f"), Inert("evil.C"), {}, [])


def test_nothing_grows_beyond_the_file(tmp_path: Path) -> None:
    """2²⁰⁰ steps would never end, nor would 32 GB of memo be had."""
    laughs = b"]q\x00" + b"".join(b"(h%ch%cl" % (at, at) + b"q%c" % (at + 1) for at in range(200)) + b"."
    tuples = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (at, at, at + 1) for at in range(200))
    programs = {
        "lists of lists": laughs,
        "a name that takes for ever to hash and to show": tuples + b"(dh\xc8Ns.",
        "a memo of billions": b"Nr\xff\xff\xff\x7f.",
    }
    for program in programs.values():
        unpickle(program)
    for length in (
        b"\x8e" + struct.pack("<Q", 2**60),
        b"X" + struct.pack("<I", 2**31),
    ):  # claims more than there is
        with pytest.raises(BadPickle):
            unpickle(length + b"abc.")
    file = _archive(tmp_path / "a.bin", programs["a name that takes for ever to hash and to show"])
    with pytest.raises(
        CheckpointError, match=r"a key of type tuple of .*a\.bin holds NoneType; weights are dense tensors by name"
    ) as refused:
        read_file(file)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "program",
    [
        _stored(shape=b"(I5\nt"),
        _stored(offset=1),
        _stored(shape=b"(I1000000000\nI1000000000\nt", stride=b"(I0\nI0\nt"),
        _stored(count=5),
        _stored(count=10**15),
        _stored(offset=-1),
        _stored(stride=b"(I-1\nt"),
        _stored(shape=b"(S'4'\nt"),
        _stored(stride=b"(t"),
        _stored().replace(b"S'0'", b"S'../../secret'"),
        _stored().replace(b"FloatStorage", b"QInt8Storage"),
        _stored().replace(b"S'storage'", b"S'module'"),
    ],
)
def test_a_tensor_that_lies_elsewhere_is_refused(program: bytes, tmp_path: Path) -> None:
    assert read_file(_archive(tmp_path / "good.bin", _stored()))["a"].tolist() == [0] * 4
    with pytest.raises(CheckpointError, match=r"bad\.bin can't be read"):
        read_file(_archive(tmp_path / "bad.bin", program))


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    packed = _archive(tmp_path / "packed.bin", _stored(), bytes(10**6), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed or too large"):
        read_file(packed)
    twice = _archive(tmp_path / "twice.bin", _stored())
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(twice, "a") as archive:
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(CheckpointError, match="two parts of one name"):
        read_file(twice)
    damaged = _archive(tmp_path / "damaged.bin", _stored(), b"0123456789abcdef")
    damaged.write_bytes(damaged.read_bytes().replace(b"0123456789abcdef", b"0123456789abcdeF"))
    with pytest.raises(CheckpointError, match=r"data/0 is damaged or missing; get the file again"):
        read_file(damaged)
    with pytest.warns(DeprecationWarning, match="jit"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "script.bin"))
    with pytest.raises(CheckpointError, match="TorchScript isn't read"):
        read_file(tmp_path / "script.bin")


def test_equal_names_in_one_pickle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'a' stands in it twice"):
        read_file(_archive(tmp_path / "a.bin", b"(dS'a'\nNsS'a'\nNs."))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_pickle_are_refused_or_inert(program: bytes) -> None:
    _read(program)


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_pickle_with_one_wrong_byte_is_refused_or_inert(at: int, byte: int) -> None:
    program = bytearray(GOOD)
    program[at % len(program)] = byte
    _read(bytes(program))


def _read(program: bytes) -> None:
    try:
        found = unpickle(program)
    except BadPickle:
        return
    kinds = (type(None), bool, int, float, str, bytes, bytearray, list, tuple, dict, Inert, StoredTensor)
    assert isinstance(found, kinds) or type(found).__name__ == "Storage"


def _good() -> bytes:
    out = io.BytesIO()
    tensors: dict[str, Tensor] = {"a": torch.ones(2, 3), "b": torch.ones(1)}
    torch.save({"state_dict": tensors, "epoch": 3, "lr": 0.1}, out)
    with zipfile.ZipFile(out) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.read(name)


GOOD = _good()
