"""Cross-entropy through a tied head, without ever holding the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 256


class _HeadLoss(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of [CHUNK, V] logits.

    The logits of a batch are by far its largest tensor; on a CPU, writing them to memory and reading
    them back for softmax and backward took 40 % of a step (d = 192, V = 16,384).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, embedding: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden, grad_embedding = torch.empty_like(hidden), torch.zeros_like(embedding)
        rows, head = hidden.to(dtype), embedding.to(dtype)
        logits = rows.new_empty(CHUNK, len(head))
        for start in range(0, len(rows), CHUNK):
            part, wanted = rows[start : start + CHUNK], targets[start : start + CHUNK, None]
            scores = torch.mm(part, head.t(), out=logits[: len(part)]).float()
            scores -= scores.amax(1, keepdim=True)
            picked = scores.gather(1, wanted)
            mass = scores.exp_().sum(1, keepdim=True)
            total += (mass.log() - picked).sum()
            scores /= mass
            scores.scatter_add_(1, wanted, torch.full_like(picked, -1.0))
            errors = scores.to(dtype)
            grad_hidden[start : start + CHUNK] = errors @ head
            grad_embedding += errors.t() @ part
        ctx.save_for_backward(grad_hidden / len(hidden), grad_embedding / len(hidden))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, embedding = ctx.saved_tensors
        return hidden * grads[0], embedding * grads[0], None, None


def head_loss(hidden: Tensor, embedding: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean cross-entropy in nats of targets [N] under the logits hidden [N, d] · embedding [V, d]ᵀ.

    Products are computed in `dtype`, the softmax and the sums in float32.
    """
    loss: Tensor = _HeadLoss.apply(hidden, embedding, targets, dtype)  # type: ignore[no-untyped-call]
    return loss
