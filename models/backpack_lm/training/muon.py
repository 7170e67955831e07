"""Muon over the matrices that a weight holds side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from backpack_lm.model import Backpack, TransformerTwin


class BlockMuon(torch.optim.Muon):
    """torch's Muon, for weights that are several matrices: each block is orthogonalised by itself.

    A query, a key and a value matrix that lie in one tensor have nothing to do with each other, nor have the
    output matrices of the senses; these, orthogonalised as one [4d, k·d], would also cost more than the rest
    of a step. Torch's class is given views, one for each block.
    """

    def __init__(self, weights: Iterable[tuple[nn.Parameter, int, int]], lr: float, weight_decay: float) -> None:
        self.weights = list(weights)
        views = [view for weight, dim, count in self.weights for view in weight.data.chunk(count, dim)]
        super().__init__(views, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step from the gradients of the weights."""
        gradients = (part for weight, dim, count in self.weights for part in _gradient(weight).chunk(count, dim))
        for view, gradient in zip(self.param_groups[0]["params"], gradients, strict=True):
            view.grad = gradient
        super().step()  # type: ignore[no-untyped-call]


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def matrices(model: Backpack | TransformerTwin) -> Iterator[tuple[nn.Parameter, int, int]]:
    """The weights of a model that are matrices of its layers, each with the dimension and number of its blocks.

    Embeddings aren't: they are tables of vectors.
    """
    for name, weight in model.named_parameters():
        if weight.ndim != 2 or ".wte." in name or ".wpe." in name:
            continue
        if name.endswith("attn.c_attn.weight") and ".h." in name:
            layer = model.config.trunk.layer  # Conv1D [d, (H + 2G)·w]: q, k, v, by heads where they are grouped
            yield weight, 1, 3 if layer.kv_heads == layer.heads else layer.heads + 2 * layer.kv_heads
        elif name == "sense_weight_net.c_attn.weight":
            yield weight, 0, 2  # Linear [2·k·(d/k), d]: q, k
        elif name == "sense_network.final_mlp.c_proj.weight":
            yield weight, 1, model.config.num_senses  # Conv1D [inner, k·d]
        else:
            yield weight, 0, 1
