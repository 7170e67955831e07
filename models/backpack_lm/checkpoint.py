"""Model folders: reading every published checkpoint, and writing the one layout that we serve.

A servable folder holds

    config.json         the shape, in Hugging Face's spelling
    model.safetensors   weights in the Hugging Face layout (`layouts.py`)
    senses-….safetensors    the sense table in parts, if it is finished and no network computes it
    tokenizer.json      a Hugging Face tokenizers file
    topics.safetensors  if it is there, max_y (E C)_y of every cell, the denominator of topic scores: minutes of
                        work for a large vocabulary, done when a topic is first wanted if not here
    manifest.json       the fingerprint and norms, for those who don't load tensors (`manifest.py`)
    generation_config.json  if there is one: how tokens are drawn where nobody says (`generation.py`)
    token_counts.json.xz    if there is one: how often each token occurs in text (`token_counts.py`)

Tensors are read by safetensors, or from `torch.save` archives whose pickles run nothing (`pickle_machine.py`). Files
that torch wrote before 1.6 are read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backpack_lm import trunks
from backpack_lm.cache import cached_name
from backpack_lm.config import BackpackConfig, ConfigError, read_object
from backpack_lm.generation import NAME as GENERATION
from backpack_lm.gguf_file import SUFFIX as GGUF
from backpack_lm.gguf_file import read_gguf
from backpack_lm.layouts import MASK, CheckpointError, Tensors, is_lightning, to_hugging_face, without_prefix
from backpack_lm.manifest import NAME as MANIFEST
from backpack_lm.manifest import TOKENIZER as TOKENIZER
from backpack_lm.manifest import TOPICS as TOPICS
from backpack_lm.manifest import Manifest, file_digest, tokenizer_digest
from backpack_lm.model import Backpack, Trunk, shapes_alone
from backpack_lm.overlay import SenseTable
from backpack_lm.sharding import Shard
from backpack_lm.token_counts import NAME as TOKEN_COUNTS
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.trunks import TrunkSpec
from backpack_lm.weight_files import TABLES, files_of, is_of_table, read_file, read_weights, write_safetensors
from backpack_lm.weight_files import WEIGHTS as WEIGHTS
from backpack_lm.whole_folder import whole

CONFIG = "config.json"
OPTIONAL = (TOPICS, GENERATION, TOKEN_COUNTS)
"""Files that a model may come with; those of another must not stay beside it."""
_PREFIX = "backpack."
_FOR_SENSES = re.compile(r"gpt2_model\.wte\.|sense_(network|rows)\.")
_SPEEDS = ".rotary_emb.inv_freq"
"""Of rotary positions: transformers once stored them beside the weights."""


def load(where: Path, config: Path | None = None, heads: int | None = None) -> Backpack:
    """The Backpack of a checkpoint, a folder or a file of weights in any layout of `layouts.py`, in float32.

    Its shape is in `config`, else in the config.json beside the weights. Stanford's Lightning files need neither:
    their tensors tell it, but for the number of `heads`. `weight_files.py` says which files are weights. Raises
    CheckpointError, naming every missing, unknown, misshapen or non-finite tensor, and ConfigError.
    """
    values = read_config(where, config, heads)
    tensors = read_weights(where)
    if values is None:
        assert heads is not None
        values = derived_config(tensors, heads)
    return from_tensors(tensors, values)


def read_config(where: Path, config: Path | None = None, heads: int | None = None) -> dict[str, Any] | None:
    """The config of a checkpoint, in any spelling; None if it has none, and its tensors and `heads` have to do.

    Raises CheckpointError if it can't be read, or there is none and no `heads`, or both and they differ.
    """
    path = config or (where.parent if where.is_file() else where) / CONFIG
    if config is None and heads is not None and not path.exists():
        return None
    try:
        values = read_object(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not there: give the model's config with --config, or, for a Lightning checkpoint of "
            "Stanford's, --heads (Backpack-Micro has 6, Mini 8, Small 12)"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None
    if heads is not None and values.get("n_head") != heads:
        raise CheckpointError(f"{path} says n_head {values.get('n_head')!r}, --heads {heads}; leave out --heads")
    return values


def tokenizer_for(where: Path, given: Path | None = None) -> tuple[Path, int]:
    """The tokenizer.json of a checkpoint, the one that is given or its own, and how many tokens it has.

    Raises CheckpointError if there is none, ValueError if it is no tokenizer.
    """
    path = given or (where.parent if where.is_file() else where) / TOKENIZER
    if not path.exists():
        raise CheckpointError(f"{path} is not there: give the model's tokenizer.json with --tokenizer")
    return path, Tokenizer.read(path).vocab_size


def derived_config(tensors: Tensors, heads: int) -> dict[str, Any]:
    """The config that the tensors of a Lightning checkpoint imply, with the attention scale and the epsilon of all
    of Stanford's. Raises CheckpointError if they are of another layout or some are missing."""
    if not is_lightning(tensors):
        raise CheckpointError(
            "only tensors in Stanford's Lightning layout do without a config.json: others don't tell whether "
            "senses are summed or averaged. Give --config"
        )
    renamed = to_hugging_face(tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in renamed.items()}
    layers = {int(name.split(".")[2]) for name in shapes if re.match(r"gpt2_model\.h\.\d+\.", name)}
    try:
        (V, d), (T, _) = shapes["gpt2_model.wte.weight"], shapes["gpt2_model.wpe.weight"]
        _, all_senses = shapes["sense_network.final_mlp.c_proj.weight"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"not this Backpack:\n  missing or misshapen: {error}") from None
    return {
        "vocab_size": V,
        "n_positions": T,
        "n_embd": d,
        "n_layer": len(layers),
        "n_head": heads,
        "num_senses": all_senses // max(d, 1),
    }


def from_tensors(tensors: Tensors, config: dict[str, Any]) -> Backpack:
    """The Backpack with these tensors, in any layout, and this `config.json`. Raises as `load` does."""
    shape, levanter = BackpackConfig.from_json(config), config.get("model_type") == "backpack-gpt2"
    renamed = to_hugging_face(tensors, shape.num_senses if levanter else None, shape.trunk.tied)
    shape = replace(shape, **_inner_widths(renamed))
    with shapes_alone():  # every weight comes from the checkpoint
        model = Backpack(shape)
    _check_names_and_shapes(renamed, model.state_dict())
    # A finished sense table stays as it is in its files, which are mapped into memory.
    is_finished = re.compile(r"sense_rows\.").match
    state = {name: t if is_finished(name) else t.float().contiguous() for name, t in renamed.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def load_part(folder: Path, shard: Shard) -> Backpack:
    """One rank's part of the model in a servable folder, in float32. Of a folder that another has verified: values
    aren't looked at. Raises CheckpointError, and ConfigError if so many ranks can't share it."""
    config = BackpackConfig.read(folder / CONFIG)
    tensors = to_hugging_face(read_weights(folder), None, config.trunk.tied)
    try:
        return shard.part(config, tensors.__getitem__)
    except KeyError as error:
        raise CheckpointError(f"{folder} lacks {error}") from None


def load_senses(folder: Path) -> Backpack:
    """The model in a servable folder that another has verified, for its sense vectors alone: the trunk has no weights.

    Raises CheckpointError and ConfigError.
    """
    config = BackpackConfig.read(folder / CONFIG)
    tensors = to_hugging_face(read_weights(folder), None, config.trunk.tied)
    with shapes_alone():
        model = Backpack(replace(config, **_inner_widths(tensors)))
    state = {n: t if n.startswith("sense_rows.") else t.float() for n, t in tensors.items() if _FOR_SENSES.match(n)}
    if lacking := {name for name in model.state_dict() if _FOR_SENSES.match(name)} - state.keys():
        raise CheckpointError(f"{folder} lacks {sorted(lacking)}")
    model.load_state_dict(state, strict=False, assign=True)
    return model.eval().requires_grad_(False)


def read_transformer(where: Path) -> tuple[TrunkSpec, dict[str, Tensor]]:
    """A Transformer of any family in `trunks`, from a Hugging Face folder or a GGUF file: its trunk and the tensors of
    that, float32, under the names of `model.Trunk`; with `lm_head.weight` where embeddings aren't tied.

    Raises CheckpointError naming the file or tensor that is missing or wrong, ConfigError.
    """
    if where.suffix == GGUF:
        model = read_gguf(where)
        values, published = model.config, model.tensors
    else:
        values, published = read_config(where) or {}, {}
    if "num_senses" in values:
        raise CheckpointError(f"{where} is a Backpack; a Transformer has no num_senses")
    # GPT-2 itself doesn't divide its scores by their layer's number.
    defaults = {"scaled_by_layer": False} if "n_embd" in values else {}
    trunk = trunks.read(values, **defaults)
    with shapes_alone():
        wanted: dict[str, Tensor] = Trunk(trunk).state_dict()
    if not trunk.tied:
        wanted["lm_head.weight"] = wanted["wte.weight"]
    there = {without_prefix(name): tensor for name, tensor in (published or read_weights(where)).items()}
    if trunk.tied:
        there.pop("lm_head.weight", None)
    tensors: dict[str, Tensor] = {}
    faults: list[str] = []
    for name in wanted:
        parts, transposed = trunks.published(trunk, name)
        found = [there.pop(part, None) for part in parts]
        faults += [f"missing: {part}" for part, tensor in zip(parts, found, strict=True) if tensor is None]
        whole = [t.t() if transposed and t.ndim > 1 else t for t in found if t is not None]
        if len(whole) == len(parts):
            tensors[name] = torch.cat(whole, dim=-1).float().contiguous()
    faults += [f"unknown: {name}" for name in there if not (MASK.search(name) or name.endswith(_SPEEDS))]
    if faults:
        raise CheckpointError(f"{where} is no {trunk.family}:\n  " + "\n  ".join(sorted(faults)))
    _check_names_and_shapes(tensors, wanted)
    return trunk, tensors


def read_trunk(where: Path) -> tuple[Trunk, Tensor]:
    """A Transformer's trunk, and the embedding [V, d] that scores its output. Raises as `read_transformer`."""
    spec, tensors = read_transformer(where)
    head = tensors.pop("lm_head.weight", None)
    with shapes_alone():
        trunk = Trunk(spec)
    trunk.load_state_dict(tensors, assign=True)
    return trunk.eval().requires_grad_(False), trunk.wte.weight if head is None else head


def save(model: Backpack, tokenizer: Path, folder: Path, topics: bool = False) -> Manifest:
    """Make `folder` servable, whole or not at all (see `whole`); the manifest that was written. Optional files of a
    model that was there before are removed, files of others stay.

    With `topics`, their denominators are computed now: V²·k·d operations. Raises OSError if it can't be written.
    """
    with whole(folder, MANIFEST, OPTIONAL) as scratch:
        return write(model, tokenizer, scratch, topics)


def write(model: Backpack, tokenizer: Path, folder: Path, topics: bool = False, origin: str | None = None) -> Manifest:
    """As `save`, file by file into an empty folder. `origin` is the SHA-256 of what a finished sense table was computed
    from, if it was computed here; see `Manifest`."""
    (folder / CONFIG).write_text(json.dumps(model.config.to_json(), indent=2) + "\n", "utf-8")
    state = {_PREFIX + name: tensor.detach() for name, tensor in model.state_dict().items()}
    files = files_of(state)
    for weights, names in files.items():
        write_safetensors(folder / weights, {name: state[name] for name in names})
    shutil.copyfile(tokenizer, folder / TOKENIZER)
    tables = {name: file_digest(folder / name) for name in files if name != WEIGHTS} if origin else {}
    manifest = Manifest(
        _fingerprint(folder, state, origin), model.config, model.sense_rms(), tokenizer_digest(folder), origin=origin,
        tables=tables,
    )  # fmt: skip
    if topics:
        metadata, kept_as = {"fingerprint": manifest.fingerprint}, cached_name(manifest.fingerprint, torch.float32)
        save_file({"peaks": model.topic_denominators(kept_as)}, folder / TOPICS, metadata=metadata)
    for file in folder.iterdir():  # safetensors makes them for their owner alone, who needn't be who serves them
        file.chmod((folder / CONFIG).stat().st_mode)
    manifest.write(folder)
    return manifest


def load_table(folder: Path, model: Backpack, manifest: Manifest, rows: Tensor | None = None) -> SenseTable:
    """The model's sense table, computed unless its rows [V, k, d] are given; with the denominators that are kept
    beside it, if they have the `manifest`'s fingerprint. Otherwise they are computed when they are first wanted.

    Raises CheckpointError if there are some that can't be read or used.
    """
    table = model.sense_table() if rows is None else model.table_of(rows)
    table.kept_as = cached_name(manifest.fingerprint, table.rows.dtype)
    if (folder / TOPICS).exists():
        try:
            with safe_open(folder / TOPICS, framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") == manifest.fingerprint:
                    peaks = file.get_tensor("peaks")
                    if peaks.shape != table.rows.shape[:2] or not peaks.is_floating_point() or not _is_finite(peaks):
                        raise ValueError(f"not a number for each of {list(table.rows.shape[:2])} cells")
                    table.peaks = peaks
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{folder / TOPICS} can't be read: {error}; import the model again") from None
    return table


def fingerprint(folder: Path, origin: str | None = None) -> str:
    """SHA-256, hex, over everything that decides what a patch means: config, tokenizer, every weight; with an `origin`,
    that instead of the finished sense table.

    The sense table is a function of these, so it need not be hashed; hashed as computed, it would differ between
    processors, and between two runs on one.
    """
    tensors = read_weights(folder) if origin is None else read_file(folder / WEIGHTS)
    return _fingerprint(folder, tensors, origin)


def _fingerprint(folder: Path, tensors: Tensors, origin: str | None) -> str:
    digest = hashlib.sha256(b"backpack.model.v1\n")
    config = json.dumps(BackpackConfig.read(folder / CONFIG).to_json(), sort_keys=True, separators=(",", ":"))
    for part in (config.encode(), (folder / TOKENIZER).read_bytes()):
        digest.update(len(part).to_bytes(8, "little") + part)
    if origin is not None:
        digest.update(f"origin {origin}\n".encode())
        tensors = {name: tensor for name, tensor in tensors.items() if not is_of_table(name)}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def verify(folder: Path) -> Manifest:
    """The folder's manifest, once it is seen to tell of these files.

    Raises ManifestError if there is none, CheckpointError if it tells of others.
    """
    manifest = Manifest.read(folder)
    if manifest.tokenizer is not None and manifest.tokenizer != tokenizer_digest(folder):
        raise CheckpointError(
            f"{folder / TOKENIZER} isn't its manifest's: it was changed or damaged; import the model again"
        )
    if manifest.origin is not None and (there := {file.name for file in folder.glob(TABLES)}) != set(manifest.tables):
        raise CheckpointError(f"{folder} has the tables {sorted(there)}, its manifest names {sorted(manifest.tables)}")
    for name, wanted in manifest.tables.items():
        if not (folder / name).exists() or file_digest(folder / name) != wanted:
            raise CheckpointError(f"{folder / name} isn't its manifest's: it was changed, damaged or removed")
    try:
        found, config = fingerprint(folder, manifest.origin), BackpackConfig.read(folder / CONFIG)
    except (OSError, CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{folder}: {error}; import the model again") from None
    if found != manifest.fingerprint:
        raise CheckpointError(
            f"the files in {folder} have fingerprint {found[:12]}…, its manifest says "
            f"{manifest.fingerprint[:12]}…: a file was changed or damaged; import the model again"
        )
    if config != manifest.config:
        raise CheckpointError(
            f"{folder / CONFIG} says {config}, the manifest {manifest.config}; import the model again"
        )
    return manifest


def _inner_widths(tensors: Tensors) -> dict[str, Any]:
    """The sense network's inner widths, where the weights say other than 4·d: the k-ablation models."""
    block = tensors.get("sense_network.block.mlp.c_fc.weight")
    final = tensors.get("sense_network.final_mlp.c_fc.weight")
    if block is None or final is None or block.ndim != 2 or final.ndim != 2:
        return {}  # reported as missing or misshapen by _check_names_and_shapes
    if block.shape[1] == final.shape[1] == 4 * block.shape[0]:
        return {}
    return {"sense_inner": (block.shape[1], final.shape[1])}


def _check_names_and_shapes(found: Tensors, wanted: Tensors) -> None:
    faults = [f"missing: {name}" for name in wanted if name not in found]
    faults += [f"unknown: {name}" for name in found if name not in wanted]
    for name in found.keys() & wanted.keys():
        tensor = found[name]
        if tensor.shape != wanted[name].shape:
            faults.append(f"shape of {name}: {list(tensor.shape)}, the config says {list(wanted[name].shape)}")
        elif not tensor.is_floating_point() and tensor.dtype != wanted[name].dtype:
            faults.append(f"type of {name}: {tensor.dtype}, not floating point")
        elif tensor.is_floating_point() and not _is_finite(tensor):
            faults.append(f"not finite: {name} holds NaN or infinity")
    if faults:
        raise CheckpointError("not this Backpack:\n  " + "\n  ".join(sorted(faults)))


def _is_finite(tensor: Tensor) -> bool:
    """In pieces, as the check makes copies; in float32, as it is served: a float64 may be beyond it."""
    pieces = tensor.reshape(-1).split(2**20) if tensor.numel() else ()
    return all(math.isfinite(bound) for part in pieces for bound in part.float().aminmax())
