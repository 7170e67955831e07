"""How far the student's predictions are from the teacher's, over the whole vocabulary, without keeping any of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK, _CHUNK_OF_DEVICE = 256, 8192


def _chunk(of: Tensor) -> int:
    """Tokens whose logits are held at a time: on a CPU as many as its caches hold, elsewhere as many as fill it."""
    return _CHUNK if of.device.type == "cpu" else _CHUNK_OF_DEVICE


@torch.no_grad()
def expected_embedding(g: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """What a teacher's predictions come down to in the loss: m = Σ_y p(y) E_y [N, d], and their entropy [N] in nats.

    The divergence of any other output o is log Σ_y exp(o·E_y) − o·m − entropy: a teacher read once needs no head
    later. `g` [N, d] are its outputs, p = softmax(g Eᵀ).
    """
    m, entropy = torch.empty_like(g, dtype=torch.float32), g.new_empty(len(g), dtype=torch.float32)
    chunk = _chunk(g)
    for part, mean, nats in zip(g.split(chunk), m.split(chunk), entropy.split(chunk), strict=True):
        logits = (part.to(embedding.dtype) @ embedding.t()).float()
        total = logits.logsumexp(1, keepdim=True)
        p = (logits - total).exp_()
        mean.copy_((p.to(embedding.dtype) @ embedding).float())
        nats.copy_(total[:, 0] - (p * logits).sum(1))
    return m, entropy


class _Distillation(torch.autograd.Function):
    """Both sums, and the gradient of their weighted sum by o, in one pass over chunks of logits."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, m: Tensor, targets: Tensor, embedding: Tensor, weight: float) -> Tensor:
        gradient, sums = torch.empty_like(o, dtype=torch.float32), o.new_zeros(2, dtype=torch.float32)
        chunk = _chunk(o)
        for at in range(0, len(o), chunk):
            part, mean, wanted = o[at : at + chunk], m[at : at + chunk].float(), embedding[targets[at : at + chunk]]
            logits = (part.to(embedding.dtype) @ embedding.t()).float()
            total = logits.logsumexp(1, keepdim=True)
            logits.sub_(total).exp_()
            expected = (logits.to(embedding.dtype) @ embedding).float()
            part = part.float()
            sums[0] += (total[:, 0] - (part * mean).sum(1)).sum()
            sums[1] += (total[:, 0] - (part * wanted.float()).sum(1)).sum()
            gradient[at : at + chunk] = (1 + weight) * expected - mean - weight * wanted.float()
        ctx.save_for_backward(gradient / len(o))
        return sums / len(o)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][0], None, None, None, None


def distillation(o: Tensor, m: Tensor, targets: Tensor, embedding: Tensor, weight: float) -> Tensor:
    """Two means in nats [2] of outputs o [N, d]: cross entropy with the teacher's predictions, and with the text.

    The gradient of the first is that of first + weight · second: backpropagate it alone. The embedding [V, d] gets
    none; products are computed in its type, sums in float32.
    """
    means: Tensor = _Distillation.apply(o, m, targets, embedding, weight)  # type: ignore[no-untyped-call]
    return means
