"""The tensor layouts that Backpacks were published in, each renamed to the Hugging Face layout.

    Hugging Face   stanfordnlp/backpack-gpt2: prefix `backpack.`, Conv1D weights [in, out]
    Lightning      Stanford's training code: prefix `model.transformer.`, Linear weights [out, in]
    Levanter       stanford-crfm/levanter-backpack-1b: Hugging Face's names; senses are summed and divided by k

Only names, orientation and that 1/k differ; `checkpoint.py` checks what comes out, tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

Tensors = Mapping[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint that can't be read as a Backpack; the message names every tensor that is at fault."""


_ALIASES = {
    "word_embeddings.weight": "gpt2_model.wte.weight",
    "position_embeddings.weight": "gpt2_model.wpe.weight",
    "embeddings.word_embeddings.weight": "gpt2_model.wte.weight",
    "embeddings.position_embeddings.weight": "gpt2_model.wpe.weight",
    "content_model.embeddings.word_embeddings.weight": "gpt2_model.wte.weight",
    "content_model.embeddings.position_embeddings.weight": "gpt2_model.wpe.weight",
    "sense_network.wte.weight": "gpt2_model.wte.weight",
    "wte.weight": "gpt2_model.wte.weight",
    "wpe.weight": "gpt2_model.wpe.weight",
    "lm_head.weight": "gpt2_model.wte.weight",
}
"""Names under which checkpoints hold a tied tensor once more. Its copies must be equal."""

_WRAPPERS = ("_orig_mod", "module")
"""What torch.compile and data-parallel training put into names, wherever they wrapped a module."""

_GPT2 = re.compile(r"(transformer\.)?h\.\d+\.")
_LIGHTNINGS_OWN = "content_model."

MASK = re.compile(r"\.attn\.(bias|masked_bias)$")  # causal masks that transformers once stored

# Stanford's code normalises after each branch, so a layer's second norm is the next layer's first.
_LIGHTNING = (
    (re.compile(r"gpt2_model\.embeddings\.word_embeddings"), "gpt2_model.wte"),
    (re.compile(r"gpt2_model\.embeddings\.position_embeddings"), "gpt2_model.wpe"),
    (re.compile(r"gpt2_model\.ln_0"), "gpt2_model.h.0.ln_1"),
    (re.compile(r"gpt2_model\.layers\.(\d+)\.norm1"), r"gpt2_model.h.\1.ln_2"),
    (re.compile(r"gpt2_model\.layers\.(\d+)\.mixer\.Wqkv"), r"gpt2_model.h.\1.attn.c_attn"),
    (re.compile(r"gpt2_model\.layers\.(\d+)\.mixer\.out_proj"), r"gpt2_model.h.\1.attn.c_proj"),
    (re.compile(r"gpt2_model\.layers\.(\d+)\.mlp\.fc1"), r"gpt2_model.h.\1.mlp.c_fc"),
    (re.compile(r"gpt2_model\.layers\.(\d+)\.mlp\.fc2"), r"gpt2_model.h.\1.mlp.c_proj"),
    (re.compile(r"content_model\.ln_0"), "sense_network.ln"),
    (re.compile(r"content_model\.layers\.0\.norm([12])"), r"sense_network.block.ln_\1"),
    (re.compile(r"content_model\.layers\.0\.mlp\.fc1"), "sense_network.block.mlp.c_fc"),
    (re.compile(r"content_model\.layers\.0\.mlp\.fc2"), "sense_network.block.mlp.c_proj"),
    (re.compile(r"content_model\.final_mlp\.fc1"), "sense_network.final_mlp.c_fc"),
    (re.compile(r"content_model\.final_mlp\.fc2"), "sense_network.final_mlp.c_proj"),
    (re.compile(r"contextualization_attn\.Wqkv"), "sense_weight_net.c_attn"),
)
_LAST_NORM = re.compile(r"gpt2_model\.layers\.(\d+)\.norm2")
_TRANSPOSED = re.compile(r"\.(attn|mlp|final_mlp)\.c_(attn|proj|fc)\.weight$")


def to_hugging_face(tensors: Tensors, averaged_over: int | None = None, tied: bool = True) -> dict[str, Tensor]:
    """Tensors of any layout under Hugging Face's names without prefix, aliases and masks dropped.

    `averaged_over` is k if the model divides its sum of senses by k (Levanter): 1/k goes into the last sense
    layer. Where embeddings aren't `tied`, the output's is a tensor of its own. Raises CheckpointError for
    nanoBackpackLM, and for copies of a tied tensor that differ.
    """
    if any("contextualization_layer." in name or "sense_vector_layer." in name for name in tensors):
        raise CheckpointError(
            "this is a nanoBackpackLM checkpoint, which is another architecture: its sense network has no "
            "outer residual, its sense weights no bias and no 1/√(d/k). It can't be served as a Backpack"
        )
    if any(_GPT2.match(name) for name in tensors) and not any(
        "sense" in name or "content_model" in name for name in tensors
    ):
        raise CheckpointError("this is a GPT-2 checkpoint: it has no sense network and no sense weights")
    bare = _renamed((without_prefix(name), name, tensor) for name, tensor in tensors.items() if not MASK.search(name))
    if any(name.startswith(_LIGHTNINGS_OWN) for name in bare):
        bare = _from_lightning(bare)
    aliases = _ALIASES if tied else {name: first for name, first in _ALIASES.items() if name != "lm_head.weight"}
    out = _without_aliases(bare, aliases)
    if averaged_over is not None:
        for part in ("weight", "bias"):
            name = f"sense_network.final_mlp.c_proj.{part}"
            if name in out:
                out[name] = out[name] / averaged_over
    return out


def is_lightning(tensors: Tensors) -> bool:
    """Whether the tensors are in the layout of Stanford's training code."""
    return any(without_prefix(name).startswith(_LIGHTNINGS_OWN) for name in tensors)


def without_prefix(name: str) -> str:
    """A tensor's name without what the classes around the model, and wrappers of these, put before it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    for prefix in ("model.transformer.", "model.backpack.", "model.", "transformer.", "backpack."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _renamed(tensors: Iterable[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
    """(new name, name, tensor) by the new names. Raises CheckpointError if two tensors that differ get one."""
    out: dict[str, Tensor] = {}
    before: dict[str, str] = {}
    for renamed, name, tensor in tensors:
        if renamed in out and not _same(out[renamed], tensor):
            raise CheckpointError(f"{before[renamed]} and {name} are both {renamed}, but they differ")
        out[renamed] = tensor
        before[renamed] = name
    return out


def _from_lightning(tensors: Tensors) -> dict[str, Tensor]:
    layers = 1 + max((int(m[1]) for name in tensors if (m := _LAST_NORM.match(name))), default=-1)
    renamed = ((_lightning_name(name, layers), name, tensor) for name, tensor in tensors.items())
    return _renamed((new, name, tensor.t() if _turned(new, tensor) else tensor) for new, name, tensor in renamed)


def _turned(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and bool(_TRANSPOSED.search(name))


def _lightning_name(name: str, layers: int) -> str:
    if match := _LAST_NORM.match(name):
        after = int(match[1]) + 1
        place = "gpt2_model.ln_f" if after == layers else f"gpt2_model.h.{after}.ln_1"
        return place + name[match.end() :]
    for pattern, replacement in _LIGHTNING:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    return name


def _without_aliases(tensors: Tensors, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    out = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    for name, tensor in tensors.items():
        if name in aliases and not _same(out.setdefault(aliases[name], tensor), tensor):
            raise CheckpointError(f"{name} should be the same tensor as {aliases[name]}, but it differs")
    return out


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool((a == b).all()))
