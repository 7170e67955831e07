"""What a run adds to a Transformer, in a folder of its own, and the two put together: a model folder to serve.

An adapter holds the sense path and the layers that were trained, with matrices in int8; the Transformer it was made
for is named by its SHA-256 and comes from wherever it is published. `assemble` computes the sense table once, in
float32, and writes it as int8.

    adapter.json             what it was made for, and its shape
    adapter-…safetensors     tensors, matrices as `int8.store` has them
    tokenizer.json            the Transformer's
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backpack_lm import int8, strict_json
from backpack_lm.adapting.student import Student
from backpack_lm.adapting.words import WordSenses, word_states
from backpack_lm.checkpoint import CONFIG, TOKENIZER, read_transformer
from backpack_lm.checkpoint import write as write_model
from backpack_lm.config import BackpackConfig, ConfigError, StoredSenses
from backpack_lm.installed import ADAPTER as NAME
from backpack_lm.layouts import CheckpointError
from backpack_lm.manifest import Manifest, file_digest
from backpack_lm.model import PART, Backpack, Trunk
from backpack_lm.weight_files import read_safetensors, write_safetensors

FILE, _FILES = "adapter-{:05}-of-{:05}.safetensors", "adapter-*.safetensors"
FILE_BYTES = 45 * 10**6
"""Most bytes of one of its files: what GitHub takes without a warning."""

CHUNK = 1024
"""Words whose senses are computed at a time."""

Progress = Callable[[int, int], None]
"""Words that are done, of how many."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What `adapter.json` says. `transformer` is the `digest` of what it was made for, `files` the SHA-256 of all that
    belongs to it."""

    transformer: str
    config: BackpackConfig
    word_layers: tuple[int, ...]
    inner: int
    tuned: int
    files: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Raises CheckpointError."""
        try:
            values: dict[str, Any] = strict_json.read(folder / NAME, finite=True)
            config = BackpackConfig.from_json(values["config"])
            return cls(
                str(values["transformer"]), config, tuple(values["word_layers"]), int(values["inner"]),
                int(values["tuned"]), dict(values["files"]),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{folder} holds no adapter: {error!r}") from None


def write_adapter(student: Student, transformer: Path, tokenizer: Path, to: Path) -> None:
    """Write what a run has made of a Transformer, a file or a folder."""
    to.mkdir(parents=True, exist_ok=True)
    for old in to.glob(_FILES):
        old.unlink()
    values: dict[str, Any] = {
        "transformer": digest(transformer),
        "config": replace(student.config, senses=StoredSenses.INT8).to_json(),
        "word_layers": list(student.word_layers),
        "inner": student.senses.c_fc.out_features,
        "tuned": student.tuned,
    }
    tensors = {name: _stored(tensor.detach().cpu()) for name, tensor in student.state_dict().items()}
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if parts[-1] and sum(each.nbytes for each in parts[-1].values()) + tensor.nbytes > FILE_BYTES:
            parts.append({})
        parts[-1][name] = tensor
    for number, part in enumerate(parts, 1):
        write_safetensors(to / FILE.format(number, len(parts)), part)
    shutil.copyfile(tokenizer, to / TOKENIZER)
    values["files"] = {file.name: file_digest(file) for file in (*sorted(to.glob(_FILES)), to / TOKENIZER)}
    (to / NAME).write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _stored(tensor: Tensor) -> Tensor:
    """Matrices in int8, with a scale for each block of a row; vectors as they are."""
    return int8.store(tensor.float(), torch.int8) if tensor.ndim > 1 else tensor.float()


def assemble(adapter: Path, transformer: Path, out: Path, progress: Progress | None = None) -> Manifest:
    """Write the model folder that an adapter and its Transformer make. `out` is an empty folder.

    Raises CheckpointError if either can't be read, or the Transformer is another one.
    """
    about = Adapter.read(adapter)
    if (found := digest(transformer)) != about.transformer:
        raise CheckpointError(
            f"{transformer} has SHA-256 {found[:12]}…; {adapter} was made for {about.transformer[:12]}…"
        )
    for name, wanted in about.files.items():
        if not (adapter / name).exists() or file_digest(adapter / name) != wanted:
            raise CheckpointError(f"{adapter / name} isn't the one that {NAME} names: it is missing or damaged")
    spec, tensors = read_transformer(transformer)
    trunk = Trunk(spec).eval().requires_grad_(False)
    head = tensors.pop("lm_head.weight", None)
    trunk.load_state_dict(tensors)
    added: dict[str, Tensor] = {}
    for name in about.files:
        if name != TOKENIZER:
            added.update(read_safetensors(adapter / name))
    added = {name: int8.restore(t) if t.dtype is torch.int8 else t for name, t in added.items()}
    state = {f"gpt2_model.{name}": tensor for name, tensor in tensors.items()}
    first = spec.depth - about.tuned
    for name, tensor in added.items():
        part, _, rest = name.partition(".")
        if part == "upper":
            number, _, rest = rest.partition(".")
            state[f"gpt2_model.h.{first + int(number)}.{rest}"] = tensor
        elif part == "norm":
            state[f"gpt2_model.ln_f.{rest}"] = tensor
        elif part == "weights":
            state[f"sense_weight_net.{rest}"] = tensor
    if head is not None:
        state["lm_head.weight"] = head
    senses = WordSenses(len(about.word_layers), spec.width, about.inner, about.config.num_senses)
    senses.load_state_dict({name.removeprefix("senses."): t for name, t in added.items() if name.startswith("senses.")})
    state.update(_finished_table(about, trunk, senses, progress or (lambda done, of: None)))
    with torch.device("meta"):
        model = Backpack(about.config)
    # As training multiplied with them; half of what float32 takes to read at each start.
    kept = {name: t.bfloat16() if t.ndim > 1 and t.is_floating_point() and "sense_rows" not in name else t
            for name, t in state.items()}  # fmt: skip
    model.load_state_dict(kept, assign=True)
    return write_model(model.eval().requires_grad_(False), adapter / TOKENIZER, out, origin=file_digest(adapter / NAME))


@torch.no_grad()
def _finished_table(
    about: Adapter, trunk: Trunk, senses: WordSenses, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the finished sense table, by name."""
    count = about.config.vocab_size
    rows = torch.empty(count, about.config.num_senses, about.config.n_embd, dtype=torch.int8)
    scales, done = torch.empty(rows.shape[:2]), 0
    assert about.config.eos_token_id is not None
    for states in word_states(trunk, about.word_layers, about.config.eos_token_id, torch.float32, CHUNK):
        computed = senses(states)
        peaks = computed.abs().amax(-1)
        here = slice(done, done + len(states))
        scales[here] = peaks / 127
        rows[here] = (computed * (127 / peaks.clamp(min=1e-30))[..., None]).round().to(torch.int8)
        done += len(states)
        progress(done, count)
    for number, start in enumerate(range(0, count, PART)):
        yield f"sense_rows.{number}.rows", rows[start : start + PART]
        yield f"sense_rows.{number}.scales", scales[start : start + PART]


def digest(transformer: Path) -> str:
    """SHA-256 in hex of a GGUF file, or over those of a folder's config and weights."""
    if transformer.is_dir():
        files = [transformer / CONFIG, *sorted(transformer.glob("*.safetensors")), *sorted(transformer.glob("*.bin"))]
        return hashlib.sha256("".join(map(digest, files)).encode()).hexdigest()
    return file_digest(transformer)
