"""Every operation in torch: the definition, on any device, and the fallback where nothing faster exists."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack_lm.int8 import restore, round_in_blocks
from backpack_lm.kernels.caches import Caches, DrawParams, MixSpan, StepInput, TokenSpan
from backpack_lm.kernels.interface import Linear
from backpack_lm.kernels.noise import log_exponentials
from backpack_lm.kernels.trunk import CachedTrunk
from backpack_lm.model import Backpack, rotated


class PlainKernels:
    """Padded to the longest sequence of a step, and gathering whole pages: simple, and correct everywhere."""

    name = "torch"

    def __init__(self, caches: Caches) -> None:
        self.caches = caches
        self._device, self._int8 = caches.table.device, caches.table.dtype is torch.int8
        self._places = torch.arange(caches.ids.shape[1], device=self._device)

    def trunk(self, model: Backpack) -> CachedTrunk:
        return CachedTrunk(self, model)

    def linear(self, weight: Tensor, bias: Tensor, gelu: bool = False, int16_inputs: bool = False) -> Linear:
        if self._int8:
            exact = self._int8_linear(weight, bias, gelu, int16_inputs)
            return lambda x: exact(x).to(self.caches.dtype)
        weight, bias = (part.detach().to(self.caches.embedding) for part in (weight, bias))

        def apply(x: Tensor) -> Tensor:
            y = F.linear(x, weight, bias)
            return F.gelu(y, approximate="tanh") if gelu else y

        return apply

    def _int8_linear(self, weight: Tensor, bias: Tensor, gelu: bool, int16_inputs: bool) -> Linear:
        """Of x in any dtype, as whole numbers of 8 bits, or with `int16_inputs` of 16; float32."""
        weight, bias = round_in_blocks(weight.detach().to(self._device)), bias.detach().to(self._device)
        limit = 32767 if int16_inputs else 127

        def apply(x: Tensor) -> Tensor:
            y = F.linear(round_in_blocks(x, limit), weight, bias)
            return F.gelu(y, approximate="tanh") if gelu else y

        return apply

    def head(self, embedding: Tensor) -> Linear:
        if self._int8:
            return self._int8_linear(embedding, torch.zeros(len(embedding)), gelu=False, int16_inputs=True)
        weight = embedding.detach().to(self.caches.embedding)
        return lambda o: F.linear(o.to(weight.dtype), weight).float()

    def append_tokens(self, new: StepInput, spans: Sequence[TokenSpan]) -> None:
        self.caches.rows[new.slots, new.positions] = new.rows
        self.caches.ids[new.slots, new.positions] = new.tokens.int()

    def residual_norm(self, x: Tensor, delta: Tensor | None, norm: nn.Module) -> Tensor:
        if delta is not None:
            x += delta
        y: Tensor = norm(x)
        return y.to(self.caches.dtype)

    def rotate(self, qkv: Tensor, positions: Tensor, turns: Tensor, heads: int) -> None:
        turned = qkv[:, : heads * 2 * turns.shape[2]].unflatten(1, (heads, -1))  # [N, heads, w]
        turned.copy_(rotated(turned.float(), turns[positions][:, None]))

    def gate(self, wide: Tensor) -> Tensor:
        gate, values = wide.float().chunk(2, dim=1)
        return (F.silu(gate) * values).to(wide.dtype)

    def attend(self, qkv: Tensor, layer: int, spans: Sequence[TokenSpan], scale: float) -> Tensor:
        caches = self.caches
        groups, width = caches.values.shape[2], caches.values.shape[4]
        qkv = qkv.view(len(qkv), -1, width)
        q, k, v = qkv.split([qkv.shape[1] - 2 * groups, groups, groups], 1)  # [N, H, w], [N, G, w], [N, G, w]
        mixed = torch.empty_like(q, memory_format=torch.contiguous_format)
        for span in spans:
            new = slice(span.token, span.token + span.size)
            caches.write(layer, span.slot, span.position, k[new], v[new])
        for span in (span for span in spans if span.size > 1):
            new, end = slice(span.token, span.token + span.size), span.position + span.size
            keys, values = self._for_heads(layer, torch.tensor([span.slot], device=self._device), end, q.shape[1])
            seen = self._places[:end] <= self._places[span.position : end, None]
            mixed[new] = F.scaled_dot_product_attention(
                q[new].transpose(0, 1)[None], keys.transpose(2, 3), values, attn_mask=seen, scale=scale
            )[0].transpose(0, 1)
        if single := [span for span in spans if span.size == 1]:
            at = torch.tensor([span.token for span in single], device=self._device)
            slots = torch.tensor([span.slot for span in single], device=self._device)
            last = torch.tensor([span.position for span in single], device=self._device)
            length = int(last.max()) + 1
            keys, values = self._for_heads(layer, slots, length, q.shape[1])
            scores = (q[at][:, :, None] @ keys).float() * scale  # [B, H, 1, T]
            scores.masked_fill_((self._places[:length] > last[:, None])[:, None, None], float("-inf"))
            mixed[at] = (scores.softmax(-1).to(values.dtype) @ values)[:, :, 0]
        return mixed.flatten(1)

    def _for_heads(self, layer: int, slots: Tensor, length: int, heads: int) -> tuple[Tensor, Tensor]:
        """Keys [B, H, w, length] and values [B, H, length, w] of slots [B], those of a group for each of its heads."""
        keys, values = self.caches.read(layer, slots, length)
        each = heads // keys.shape[1]
        return keys.repeat_interleave(each, 1), values.repeat_interleave(each, 1)

    def mix(self, queries: Tensor, predictions: Sequence[MixSpan]) -> Tensor:
        caches = self.caches
        slots = torch.tensor([p.slot for p in predictions], device=self._device)
        last = torch.tensor([p.length - 1 for p in predictions], device=self._device)
        length = max(p.length for p in predictions)
        future = self._places[:length] > last[:, None]  # [B, T]
        scores = (queries[:, :, None] @ caches.read_sense_keys(slots, length))[:, :, 0].float()  # [B, k, T]
        scores /= math.sqrt(queries.shape[-1])
        alpha = scores.masked_fill_(future[:, None], float("-inf")).softmax(-1).transpose(1, 2)  # [B, T, k]
        for n, prediction in enumerate(predictions):
            if prediction.topics:
                if prediction.fresh:
                    self.update_annealing(prediction, prediction.length - 1)
                alpha[n, : prediction.length] *= self.multipliers(prediction)
        # Places beyond a sequence have weight zero; row 0 stands in for whatever the slot held there before.
        rows = caches.rows[slots, :length].masked_fill_(future[..., None], 0)
        if self._int8:
            return torch.einsum("btk,btkd->bd", alpha, restore(caches.table[rows.long()]))
        return F.embedding_bag(
            rows.flatten(1), caches.table, per_sample_weights=alpha.flatten(1).to(caches.table.dtype), mode="sum"
        ).float()

    def draw(self, logits: Tensor, params: Sequence[DrawParams]) -> Tensor:
        return draw_plainly(logits, params)

    def log_probabilities(self, logits: Tensor, chosen: Sequence[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
        logs = logits.double().log_softmax(-1)
        likeliest = logs.topk(count)
        own = logs.gather(1, torch.tensor(chosen, device=logs.device)[:, None])
        return own[:, 0], likeliest.indices, likeliest.values

    def multipliers(self, prediction: MixSpan) -> Tensor:
        """Effective multiplier of each cell of a slot, [length, k]."""
        caches, length = self.caches, prediction.length
        out = torch.ones_like(caches.annealed_sum[prediction.slot, :length])
        ids, places = caches.ids[prediction.slot, :length].long(), self._places[:length, None]
        for topic in prediction.topics:
            out *= topic.anneal(topic.targets(ids), caches.annealed_sum[prediction.slot, :length], places)
        return out

    def update_annealing(self, prediction: MixSpan, start: int) -> None:
        if not any(topic.annealed for topic in prediction.topics):
            return
        caches, slot, length = self.caches, prediction.slot, prediction.length
        annealed_sum, rows, ids = caches.annealed_sum[slot], caches.rows[slot], caches.ids[slot].long()

        def sums(cells: slice, tokens: slice) -> Tensor:
            """Σ over some tokens of relu(E[x]·C) for each cell: [·, k]."""
            vectors = restore(caches.table[rows[cells].long()])
            return (vectors @ caches.embedding[ids[tokens]].float().t()).relu().sum(-1)

        annealed_sum[:start] += sums(slice(start), slice(start, length))
        annealed_sum[start:length] = sums(slice(start, length), slice(length))


def draw_plainly(logits: Tensor, params: Sequence[DrawParams]) -> Tensor:
    """`Kernels.draw` by torch alone: the oracle."""
    values = logits
    if any(d.temperature for d in params):
        temperatures = torch.tensor([d.temperature for d in params], device=logits.device)[:, None]
        tokens = torch.arange(logits.shape[1], device=logits.device)
        noise = log_exponentials([d.seed for d in params], [d.position for d in params], tokens)
        values = torch.where(temperatures > 0, logits / temperatures - noise, logits)
    if (likely := kept(logits, params)) is not None:
        values = values.masked_fill(~likely, float("-inf"))
    best, chosen = values.max(-1)
    return chosen.masked_fill((best == float("-inf")) | ~(logits < float("inf")).all(-1), -1)


def kept(logits: Tensor, params: Sequence[DrawParams]) -> Tensor | None:
    """Whether each token may be drawn, bool [G, V] for logits [G, V]; None if all may, in all rows."""
    if not any(d.top_k or d.top_p < 1 for d in params):
        return None
    count, device = logits.shape[1], logits.device
    limit = torch.tensor([d.top_k or count for d in params], device=device)[:, None]
    share = torch.tensor([d.top_p for d in params], dtype=torch.float64, device=device)[:, None]
    temperatures = torch.tensor([d.temperature or 1.0 for d in params], dtype=torch.float64, device=device)[:, None]
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    inside = torch.arange(count, device=device) < limit
    mass = (ordered.double() / temperatures).masked_fill(~inside, float("-inf")).softmax(-1)
    # Those before a token that is kept have less than its share: at least one always is.
    inside &= (share >= 1) | (mass.cumsum(-1) - mass < share)
    return torch.zeros_like(inside).scatter(-1, tokens, inside)
