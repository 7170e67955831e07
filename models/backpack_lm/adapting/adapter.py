"""An adapter: the folder of what a run has learnt of a Transformer, and the model folder that both make together.

An adapter holds the sense path and the layers that were trained, with matrices in int8. The Transformer is not in it:
it is named by its digest, and comes from wherever it is published. `assemble` computes the sense table in float32 and
stores it in int8.

    adapter.json            what it was made for, its shape, and the SHA-256 of its other files
    adapter-….safetensors   tensors, matrices as `int8.store` has them
    tokenizer.json          the Transformer's
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backpack_lm import int8, strict_json
from backpack_lm.adapting.student import Student
from backpack_lm.adapting.words import WordSenses, word_states
from backpack_lm.checkpoint import CONFIG, TOKENIZER, read_trunk
from backpack_lm.checkpoint import write as write_model
from backpack_lm.config import BackpackConfig, ConfigError, StoredSenses
from backpack_lm.denominators import Progress
from backpack_lm.installed import ADAPTER as NAME
from backpack_lm.layouts import CheckpointError
from backpack_lm.manifest import Manifest, file_digest
from backpack_lm.model import Backpack, FinishedSenses, Trunk, shapes_alone
from backpack_lm.weight_files import read_safetensors, write_safetensors
from backpack_lm.whole_folder import whole

FILE = "adapter-{:05}-of-{:05}.safetensors"
FILE_BYTES = 45 * 10**6
"""Most bytes of one of its files: GitHub warns of more than 50 MB."""

WORDS = 1024
"""Whose senses are computed at a time; a part of a finished table is a multiple of it."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What `adapter.json` says. `transformer` is the `digest` of what it was made for, `files` the SHA-256 of all that
    belongs to it."""

    transformer: str
    config: BackpackConfig
    word_layers: tuple[int, ...]
    sense_inner: int
    tuned: int
    files: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """A folder's. Raises CheckpointError if it holds none, or one of its files is missing or damaged."""
        try:
            values: dict[str, Any] = strict_json.read(folder / NAME, finite=True)
            adapter = cls(
                str(values["transformer"]), BackpackConfig.from_json(values["config"]), tuple(values["word_layers"]),
                int(values["sense_inner"]), int(values["tuned"]), dict(values["files"]),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{folder} holds no adapter: {error!r}") from None
        for name, wanted in adapter.files.items():
            if not (folder / name).exists() or file_digest(folder / name) != wanted:
                raise CheckpointError(f"{folder / name} isn't the one that {NAME} names: it is missing or damaged")
        return adapter

    def tensors(self, folder: Path) -> dict[str, Tensor]:
        """What was learnt, by the names of `Student`, in float32."""
        found: dict[str, Tensor] = {}
        for file in self.files:
            if file != TOKENIZER:
                found |= read_safetensors(folder / file)
        return {name: int8.restore(each) if each.dtype is torch.int8 else each for name, each in found.items()}


def begin_after(student: Student, folder: Path, transformer: str) -> None:
    """Give a student what another run has learnt of the same Transformer, by its digest.

    The student may train more layers than that run. Raises CheckpointError if it has another shape.
    """
    about = Adapter.read(folder)
    if about.transformer != transformer:
        raise CheckpointError(
            f"{folder} was made for the Transformer with SHA-256 {about.transformer[:12]}…, this one has "
            f"{transformer[:12]}…; adapt that one, or begin after another adapter"
        )
    own = replace(student.config, senses=about.config.senses)
    theirs, ours = (
        {**config.to_json(), "word_layers": layers, "sense_inner": inner}
        for config, layers, inner in (
            (about.config, about.word_layers, about.sense_inner),
            (own, student.word_layers, student.senses.c_fc.out_features),
        )
    )
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"{folder} has {name} {theirs.get(name)}, this run {ours.get(name)}; give a recipe with the adapter's "
                "value, or begin after another adapter"
            )
    if (more := student.tuned - about.tuned) < 0:
        raise CheckpointError(
            f"{folder} has {about.tuned} trained layers, the recipe's tuned_layers is {student.tuned}; it must be "
            f"{about.tuned} or more"
        )
    state = student.state_dict()
    for name, tensor in about.tensors(folder).items():
        part, _, rest = name.partition(".")
        state[f"upper.{_renumbered(rest, more)}" if part == "upper" else name] = tensor
    student.load_state_dict(state)
    student.moved = about.tuned > 0


def _renumbered(name: str, by: int) -> str:
    """The name of a tensor in a list of layers, NUMBER.REST, once so many layers stand before the list."""
    number, _, rest = name.partition(".")
    return f"{int(number) + by}.{rest}"


def write_adapter(student: Student, transformer: str, tokenizer: Path, folder: Path) -> None:
    """Write what a run has made of the Transformer with this `digest`, whole or not at all."""
    tensors = {name: _stored(tensor.detach().cpu()) for name, tensor in student.state_dict().items()}
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if parts[-1] and sum(each.nbytes for each in parts[-1].values()) + tensor.nbytes > FILE_BYTES:
            parts.append({})
        parts[-1][name] = tensor
    with whole(folder, NAME) as scratch:
        for number, part in enumerate(parts, 1):
            write_safetensors(scratch / FILE.format(number, len(parts)), part)
        shutil.copyfile(tokenizer, scratch / TOKENIZER)
        values = {
            "transformer": transformer,
            "config": replace(student.config, senses=StoredSenses.INT8).to_json(),
            "word_layers": list(student.word_layers),
            "sense_inner": student.senses.c_fc.out_features,
            "tuned": student.tuned,
            "files": {file.name: file_digest(file) for file in sorted(scratch.iterdir())},
        }
        (scratch / NAME).write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _stored(tensor: Tensor) -> Tensor:
    """Matrices in int8, with a scale for each block of a row; vectors as they are."""
    return int8.store(tensor.float(), torch.int8) if tensor.ndim > 1 else tensor.float()


def assemble(adapter: Path, transformer: Path, out: Path, progress: Progress | None = None) -> Manifest:
    """Write the model folder that an adapter and its Transformer make. `out` is an empty folder; `progress` is told the
    words whose senses are computed.

    Raises CheckpointError if either can't be read, or the Transformer is another one.
    """
    about = Adapter.read(adapter)
    if (found := digest(transformer)) != about.transformer:
        raise CheckpointError(
            f"{transformer} has SHA-256 {found[:12]}…; {adapter} was made for {about.transformer[:12]}…"
        )
    trunk, embedding = read_trunk(transformer)
    added: dict[str, dict[str, Tensor]] = {"senses": {}, "weights": {}, "upper": {}, "norm": {}}
    for name, tensor in about.tensors(adapter).items():
        part, _, rest = name.partition(".")
        added[part][rest] = tensor
    senses = WordSenses(len(about.word_layers), trunk.spec.width, about.sense_inner, about.config.num_senses)
    senses.load_state_dict(added["senses"])
    table = _finished_senses(about, trunk, senses, progress or (lambda done, of: None))
    state = {f"gpt2_model.{name}": tensor for name, tensor in trunk.state_dict().items()}
    for name, tensor in added["upper"].items():
        state[f"gpt2_model.h.{_renumbered(name, trunk.spec.depth - about.tuned)}"] = tensor
    state |= {f"gpt2_model.ln_f.{name}": tensor for name, tensor in added["norm"].items()}
    state |= {f"sense_weight_net.{name}": tensor for name, tensor in added["weights"].items()}
    if not trunk.spec.tied:
        state["lm_head.weight"] = embedding
    # As training multiplied with them; half of what float32 takes to read at each start.
    state = {name: tensor.bfloat16() if tensor.ndim > 1 else tensor for name, tensor in state.items()}
    with shapes_alone():
        model = Backpack(about.config)
    model.load_state_dict(
        state | {f"sense_rows.{name}": tensor for name, tensor in table.state_dict().items()}, assign=True
    )
    return write_model(model.eval().requires_grad_(False), adapter / TOKENIZER, out, origin=file_digest(adapter / NAME))


@torch.no_grad()
def _finished_senses(about: Adapter, trunk: Trunk, senses: WordSenses, progress: Progress) -> FinishedSenses:
    table, done = FinishedSenses(about.config), 0
    assert about.config.eos_token_id is not None
    for states in word_states(trunk, about.word_layers, about.config.eos_token_id, torch.float32, WORDS):
        table.store(done, senses(states))
        done += len(states)
        progress(done, about.config.vocab_size)
    return table


def digest(transformer: Path) -> str:
    """SHA-256 in hex of a GGUF file, or over those of a folder's config and weights."""
    if transformer.is_dir():
        weights = sorted(transformer.glob("*.safetensors")) or sorted(transformer.glob("*.bin"))
        return hashlib.sha256("".join(map(file_digest, [transformer / CONFIG, *weights])).encode()).hexdigest()
    return file_digest(transformer)
