"""The Transformer that a Backpack is compared with, read from a training run or from a GPT-2 folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from backpack_lm import strict_json
from backpack_lm.checkpoint import CONFIG, WEIGHTS
from backpack_lm.config import BackpackConfig, read_object
from backpack_lm.layouts import CheckpointError
from backpack_lm.model import TransformerTwin
from backpack_lm.training.trainer import CHECKPOINT, read_checkpoint
from backpack_lm.weight_files import read_file

_ALIASES = ("lm_head.weight",)


def read_twin(folder: Path, subject: BackpackConfig) -> TransformerTwin:
    """The twin in `folder`: checkpoint.pt of `backpack train --twin`, or Hugging Face's GPT-2 (config.json and
    model.safetensors). It must read the subject's vocabulary.

    Raises CheckpointError if it is neither, or has another vocabulary.
    """
    try:
        values, tensors = _from_run(folder) if (folder / CHECKPOINT).exists() else _from_gpt2(folder)
        twin = TransformerTwin(BackpackConfig.from_json(values))
        twin.load_state_dict(tensors)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder} is no Transformer to compare with: {error}") from None
    if twin.config.vocab_size < subject.tokens:
        raise CheckpointError(
            f"{folder} has a vocabulary of {twin.config.vocab_size}, the Backpack one of {subject.tokens}; "
            "a twin is trained on the same tokens"
        )
    return twin.eval().requires_grad_(False)


def _from_run(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = read_checkpoint(folder / CHECKPOINT)
    made_by = strict_json.parse(state["made_by"])
    if not made_by["twin"]:
        raise ValueError("it is the run of a Backpack; give the one made with --twin")
    return made_by["config"], state["model"]


def _from_gpt2(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values = read_object(folder / CONFIG)
    if "num_senses" in values:
        raise ValueError("it is a Backpack")
    # A twin has no senses: 1 is unused. So is the end of text, which Hugging Face's default puts at 50256.
    values = {"scale_attn_by_inverse_layer_idx": False, **values, "num_senses": 1, "eos_token_id": None}
    tensors = {
        "gpt2_model." + name.removeprefix("transformer."): tensor.float()
        for name, tensor in read_file(folder / WEIGHTS).items()
        if name not in _ALIASES and not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    return values, tensors
