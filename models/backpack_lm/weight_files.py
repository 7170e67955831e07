"""Which files of a folder are its weights, and the tensors in them.

Nothing is guessed: an index says which shards belong together, and what it doesn't name isn't read. Where two
files have a tensor of one name, or several checkpoints lie side by side, the folder is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from backpack_lm import strict_json
from backpack_lm.layouts import CheckpointError, Tensors
from backpack_lm.manifest import NAME as MANIFEST
from backpack_lm.manifest import TOPICS
from backpack_lm.pickle_machine import Inert, StoredTensor
from backpack_lm.strict_json import JsonError, is_lfs_pointer
from backpack_lm.torch_archive import TorchArchive

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
SENSES = "senses-{:0>5}-of-{:0>5}.safetensors"
"""Files of a finished sense table, each with a part of the vocabulary."""
TABLES = "senses-*-of-*.safetensors"
INDEX = ".index.json"
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.\w+")
_MOST_HEADER = 10**8  # bytes; the safetensors library takes no more
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}
_SENSE_PART = re.compile(r"(?:backpack\.)?sense_rows\.(\d+)\.")
_ZIP, _SAFETENSORS = b"PK\x03\x04", ".safetensors"


def read_weights(where: Path) -> Tensors:
    """The tensors of a checkpoint: a file, or a folder with

    model.safetensors and the senses-*.safetensors beside it, else the *.safetensors that its index names, else all of
    them, else pytorch_model.bin, else the *.bin that its index names, else pytorch_model-*.bin, else the one *.ckpt.

    Raises CheckpointError, with the fix, naming the file that is missing, damaged, outside, or one too many.
    """
    if where.is_file():
        return read_file(where)
    if not where.is_dir():
        raise CheckpointError(f"{where} is not there, or no folder")
    for whole, loose in ((WEIGHTS, "*.safetensors"), (PICKLED, "pytorch_model-*.bin")):
        index, shards = where / (whole + INDEX), sorted(where.glob(loose))
        if (where / whole).exists():
            if index.exists() and not (where / MANIFEST).exists() and set(_weight_map(index).values()) != {whole}:
                raise CheckpointError(
                    f"{where} has {whole}, and {index.name} names other files; leave the checkpoint that is meant"
                )
            parts = sorted(where.glob(TABLES)) if whole == WEIGHTS else []
            return _merge_files([where / whole, *parts]) if parts else read_file(where / whole)
        if index.exists():
            return _follow(index)
        if shards := [path for path in shards if path.name != TOPICS]:
            return _merge_files(shards)
    found = sorted(where.glob("*.ckpt"))
    if len(found) > 1:
        raise CheckpointError(f"{where} has {', '.join(p.name for p in found)}; leave the one that is meant")
    if not found:
        raise CheckpointError(f"{where} has no *.safetensors, {PICKLED} or *.ckpt, nor an index of such files")
    return read_file(found[0])


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by what it is and not by what it is called. Raises CheckpointError naming it."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if is_lfs_pointer(start):
            raise CheckpointError(
                f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in {path.parent}, then again"
            )
        if path.suffix == _SAFETENSORS:
            return read_safetensors(path)
        return _dense(path, _read_archive(path) if start.startswith(_ZIP) else _read_legacy(path))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError, OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise CheckpointError(f"{path} can't be read: it is cut off, or no safetensors file; get it again")
        try:
            strict_json.parse(file.read(length))  # the library takes the last of equal names
        except JsonError as error:
            raise CheckpointError(f"{path} can't be read: its header: {error}") from None
    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError):
        raise CheckpointError(f"{path} can't be read: it is damaged or cut off; get it again") from None
    return found


def files_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of a model folder, and which of its tensors are in each."""
    by_part: dict[int | None, list[str]] = {None: []}
    for name in names:
        part = _SENSE_PART.match(name)
        by_part.setdefault(int(part[1]) if part else None, []).append(name)
    count = len(by_part) - 1
    return {WEIGHTS if part is None else SENSES.format(part + 1, count): own for part, own in by_part.items()}


def is_of_table(name: str) -> bool:
    """Whether a tensor is part of a finished sense table."""
    return _SENSE_PART.match(name) is not None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, one after the other: safetensors' own `save_file` holds a second copy of all of them in memory.

    Raises ValueError for a dtype that has no name in the format, OSError.
    """
    ordered = sorted(
        tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
    )  # aligned, as the library does
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; safetensors has {', '.join(map(str, _DTYPES))}")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _read_archive(path: Path) -> Mapping[Any, Any]:
    with closing(TorchArchive(path)) as archive:
        values = _state(path, archive.read())
        return {
            name: archive.tensor(str(name)[:100], value) if isinstance(value, StoredTensor) else value
            for name, value in values.items()
        }


def _read_legacy(path: Path) -> Mapping[Any, Any]:
    """What torch wrote before 1.6, by torch itself, which executes nothing with `weights_only`."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds, and advises to load it unsafely
        raise CheckpointError(
            f"{path} can't be read: it is damaged, or no weights, or holds other things than tensors. Ask who "
            "made the model for safetensors"
        ) from None
    return _state(path, values)


def _state(path: Path, values: Any) -> Mapping[Any, Any]:
    values = values.get("state_dict", values) if isinstance(values, Mapping) else values
    if isinstance(values, Mapping):
        return values
    raise CheckpointError(f"{path}: weights can't be read: it holds {_type_name(values)}, not tensors by name")


def _dense(path: Path, values: Mapping[Any, Any]) -> dict[str, Tensor]:
    for name, value in values.items():
        if not (isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided):
            shown = repr(name[:100]) if isinstance(name, str) else _type_name(name)
            raise CheckpointError(
                f"not this Backpack:\n  {shown} of {path} holds {_type_name(value)}; weights are dense tensors by name"
            )
    return dict(values)


def _type_name(value: object) -> str:
    if isinstance(value, Tensor):
        return str(value.layout)
    return value.name if isinstance(value, Inert) else type(value).__name__


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → file. Raises CheckpointError if that isn't what the file holds."""
    try:
        values = strict_json.read(index)
    except (OSError, JsonError) as error:
        raise CheckpointError(f"{index} can't be read: {getattr(error, 'strerror', None) or error}") from None
    found = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f'{index} is no index of weights: it has no "weight_map" of tensors to files')
    return found


def _follow(index: Path) -> Tensors:
    """The tensors that an index names, each out of the file that it says."""
    wanted: dict[str, set[str]] = {}
    for tensor, name in _weight_map(index).items():
        wanted.setdefault(name, set()).add(tensor)
    suffix = _SAFETENSORS if index.name.startswith(WEIGHTS) else ".bin"
    files = {name: _inside(index.parent, name, index, suffix) for name in wanted}  # all, before one is read
    out: dict[str, Tensor] = {}
    for name, path in files.items():
        found = read_file(path)
        if missing := sorted(wanted[name] - found.keys()):
            raise CheckpointError(f"{index} says that {missing[0]} is in {name}, but it isn't; get both again")
        if more := sorted(found.keys() - wanted[name]):
            raise CheckpointError(f"{path} has {more[0]}, which {index.name} doesn't put there; get both again")
        out.update(found)
    return out


def _inside(folder: Path, name: str, said_by: Path, suffix: str) -> Path:
    """The file of a name in a folder. Raises CheckpointError if there is none, or it lies elsewhere."""
    path = folder / name
    try:
        target, there = path.resolve(), path.is_file()
    except (OSError, ValueError, RuntimeError):
        target, there = path, False
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":  # Hugging Face's cache: links to the files of all revisions
        allowed.append(folder.resolve().parent.parent / "blobs")
    if ".." in Path(name).parts or not any(target.is_relative_to(parent) for parent in allowed):
        raise CheckpointError(f"{said_by} names {name!r}, which is outside of {folder}; copy the file into it")
    if not path.name.endswith(suffix):
        raise CheckpointError(f"{said_by} names {name!r}; it should name *{suffix} files")
    if not there:
        raise CheckpointError(f"{said_by} names {name!r}, which is missing; get all shards of the checkpoint")
    return path


def _merge_files(paths: list[Path]) -> Tensors:
    """The tensors of files that no index names. Raises CheckpointError where that would be a guess."""
    sets: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if match := _SHARD.fullmatch(path.name):
            sets.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in sets.items():
        if missing := sorted(set(range(1, min(count, 10**4) + 1)) - numbers):
            raise CheckpointError(f"{paths[0].parent} lacks shard {missing[0]} of the {count} of {stem}")
    out: dict[str, Tensor] = {}
    owner: dict[str, Path] = {}
    for path in paths:
        for name, tensor in read_file(path).items():
            if (before := owner.setdefault(name, path)) is not path:
                raise CheckpointError(
                    f"{before.name} and {path.name} in {path.parent} both have {name}, and no index says which "
                    "counts; leave the files of one checkpoint"
                )
            out[name] = tensor
    return out
