"""The noise of sampling: a function of (seed, position, token) alone, the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def log_exponentials(seeds: Sequence[int], positions: Sequence[int], tokens: Tensor) -> Tensor:
    """log e_y for every row and each of some tokens [n]: [G, n] float32, e_y exponential.

    argmax_y (logit_y − log e_y) then has the distribution softmax(logits): Gumbel's trick. Token y gets word
    (y mod 64) // 16 of Philox's block 16·(y // 64) + y mod 16, so that 16 neighbours come from 16 blocks at once.
    """
    block, word = tokens // 64 * 16 + tokens % 16, tokens % 64 // 16
    keys = torch.tensor([(s & LOW, s >> 32) for s in seeds], device=tokens.device)
    places = torch.tensor(positions, device=tokens.device)
    words = philox(keys[:, :1], keys[:, 1:], block[None].expand(len(seeds), -1), places[:, None])
    bits = words.gather(0, word.expand(1, len(seeds), -1))[0]
    uniform = (bits.float() + 0.5) * 2**-32  # small ones, which decide, are exact
    return (-torch.log1p(-uniform.clamp_max(1 - 2**-24))).log()


def philox(k0: Tensor, k1: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011) of counters (c0, c1, 0, 0) under keys (k0, k1): [4, …] of 32 bits."""
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # Products of 64 bits wrap around as they should; their high half is masked free of the sign.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) & LOW ^ c1 ^ k0, b & LOW, (a >> 32) & LOW ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return torch.stack([c0, c1, c2, c3])
