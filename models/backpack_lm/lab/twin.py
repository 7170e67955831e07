"""The Transformer that a Backpack is compared with, read from a training run or from a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from backpack_lm import strict_json
from backpack_lm.checkpoint import read_transformer
from backpack_lm.config import BackpackConfig
from backpack_lm.layouts import CheckpointError
from backpack_lm.model import TransformerTwin
from backpack_lm.training.trainer import CHECKPOINT, read_checkpoint


def read_twin(folder: Path, subject: BackpackConfig) -> TransformerTwin:
    """The twin in `folder`: checkpoint.pt of `backpack train --twin`, or a Transformer of a family in `trunks`, as
    Hugging Face has it (config.json and weights). It must read the subject's vocabulary.

    Raises CheckpointError if it is neither, or has another vocabulary.
    """
    try:
        config, tensors = _from_run(folder) if (folder / CHECKPOINT).exists() else _from_hugging_face(folder)
        twin = TransformerTwin(config)
        twin.load_state_dict(tensors)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder} is no Transformer to compare with: {error}") from None
    if twin.config.vocab_size < subject.tokens:
        raise CheckpointError(
            f"{folder} has a vocabulary of {twin.config.vocab_size}, the Backpack one of {subject.tokens}; "
            "a twin is trained on the same tokens"
        )
    return twin.eval().requires_grad_(False)


def _from_run(folder: Path) -> tuple[BackpackConfig, dict[str, Tensor]]:
    state = read_checkpoint(folder / CHECKPOINT)
    made_by = strict_json.parse(state["made_by"])
    if not made_by["twin"]:
        raise ValueError("it is the run of a Backpack; give the one made with --twin")
    return BackpackConfig.from_json(made_by["config"]), state["model"]


def _from_hugging_face(folder: Path) -> tuple[BackpackConfig, dict[str, Tensor]]:
    trunk, tensors = read_transformer(folder)
    named = {name if name == "lm_head.weight" else f"gpt2_model.{name}": tensor for name, tensor in tensors.items()}
    # A twin has no senses: 1 is unused. So is the end of text, which Hugging Face's default puts at 50256.
    return BackpackConfig(trunk, num_senses=1), named
