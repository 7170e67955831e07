"""The Backpack in training: a sense path over kept states of a trunk, and copies of the trunk's uppermost layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack_lm.adapting.words import WordSenses
from backpack_lm.config import BackpackConfig
from backpack_lm.model import SenseWeights, Trunk, turns_of


class Student(nn.Module):
    """o [B, T, d] of ids [B, T] and the states of their rows that were kept.

    Where the uppermost `tuned` layers of the trunk are as the teacher's, the kept states are what they make of the
    text. To be trained, or once they have been (`moved`), they are run again from the state before them.
    """

    def __init__(
        self, config: BackpackConfig, trunk: Trunk, words: Tensor, word_layers: Sequence[int], inner: int,
        layers: Sequence[int], tuned: int,
    ) -> None:  # fmt: skip
        """`words` [V, L, d] are the states of lone words at `word_layers`, `layers` those whose states of rows are
        kept."""
        super().__init__()
        self.config, self.layers, self.tuned = config, list(layers), tuned
        self.word_layers = tuple(word_layers)
        self.moved = False
        self.words = words  # no parameter, and in no checkpoint: it can be made again
        self.senses = WordSenses(words.shape[1], config.n_embd, inner, config.num_senses)
        self.weights = SenseWeights(config)
        # Copies: the teacher stays as it is.
        self.upper = copy.deepcopy(trunk.h[config.trunk.depth - tuned :]).requires_grad_(True)
        self.norm = copy.deepcopy(trunk.ln_f).requires_grad_(True)

    def sense_vectors(self, ids: Tensor) -> Tensor:
        """C(x) of ids [n]: [n, k, d]."""
        computed: Tensor = self.senses(self.words[ids].float())
        return computed

    def alpha(self, states: Tensor, tune: bool) -> Tensor:
        """α [B, k, T, T] of kept states [B, T, S, d]. With `tune`, the copied layers get gradients."""
        unread = states.new_empty(0)
        by_layer = [unread] * (self.config.trunk.depth + 1)
        for layer, state in zip(self.layers, states.unbind(2), strict=True):
            by_layer[layer] = state.float()
        if self.tuned and (tune or self.moved):
            with torch.set_grad_enabled(tune and torch.is_grad_enabled()):
                self._run_upper(by_layer)
        alpha: Tensor = self.weights(by_layer)
        return alpha

    def _run_upper(self, states: list[Tensor]) -> None:
        """Replace the states after the copied layers."""
        trunk = self.config.trunk
        first = trunk.depth - self.tuned
        x, turns = states[first], None
        if trunk.rotary is not None:
            turns = turns_of(trunk.rotary, range(x.shape[1]), trunk.layer.head_width).to(x)
        for number, block in enumerate(self.upper, first + 1):
            x = block(x, turns)
            states[number] = x
        states[-1] = self.norm(x)

    def forward(self, ids: Tensor, states: Tensor, tune: bool = False) -> Tensor:
        unique, where = ids.unique(return_inverse=True)
        computed = self.sense_vectors(unique)
        senses = F.embedding(where, computed.flatten(1)).view(*ids.shape, *computed.shape[1:])
        alpha = self.alpha(states, tune).to(senses.dtype)
        mixed: Tensor = (alpha @ senses.transpose(1, 2)).sum(1, dtype=torch.float32)
        return mixed


BY_PLACE = 4
"""Senses that begin by reading one place of the text."""


@torch.no_grad()
def start_weights(weights: SenseWeights, theta: float) -> None:
    """Begin with sense weights by distance: sense n < BY_PLACE reads the word n places back, each further one a wider
    stretch of the text before it. What the words are comes in as the weights are trained.

    With pairs of a query's bias at the angle 0 and of a key's at −δ·θ_p, the score of position j for position i is
    Σ_p cos(θ_p (i − j − δ)), greatest at j = i − δ; slow pairs alone make it wide.
    """
    k, w = weights.num_senses, weights.head_width
    speeds = theta ** (-torch.arange(0, w, 2, dtype=torch.float32) / w)
    query, key = torch.zeros(k, w), torch.zeros(k, w)
    for sense in range(k):
        if sense < BY_PLACE:
            size, angles = 2.5 * (speeds > 0.01), sense * speeds
        else:
            width = 2 * math.pi * 1.35 ** (sense - BY_PLACE)  # tokens, up to 170 of 16 senses
            size, angles = 4.0 * ((speeds < 1 / width) & (speeds > 0.05 / width)), 0 * speeds
        query[sense, : w // 2] = size
        key[sense] = torch.cat([size * angles.cos(), size * angles.sin()])
    biases = weights.c_attn.bias.chunk(2) if weights.together else (weights.c_query.bias, weights.c_key.bias)
    for bias, start in zip(biases, (query, key), strict=True):
        bias.copy_(start.flatten())
    for linear in weights.children():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=0.5 / math.sqrt(linear.weight.shape[1]))


class LeastSquares:
    """The senses that a run begins with: a matrix W_l for each, of the teacher's output p(x) after the word alone, such
    that with the first sense weights the mix is as near as can be to the teacher's output in the text.

    As o_i = Σ_l (Σ_j α[l,i,j] p(x_j)) W_l, that is one linear regression with k·d inputs.
    """

    def __init__(self, student: Student) -> None:
        k, d = student.config.num_senses, student.config.n_embd
        self._student = student
        self._squares = torch.zeros(k * d, k * d, device=student.words.device)
        self._products = torch.zeros(k * d, d, device=student.words.device)

    @torch.no_grad()
    def add(self, ids: Tensor, states: Tensor) -> None:
        """Rows more: ids [B, T], kept states [B, T, S, d], whose last is the teacher's output."""
        alpha = self._student.alpha(states, tune=False)
        predicted = self._student.words[ids, -1].float()
        inputs = (alpha @ predicted[:, None]).transpose(1, 2).flatten(2).flatten(0, 1)
        self._squares.addmm_(inputs.t(), inputs)
        self._products.addmm_(inputs.t(), states[:, :, -1].float().flatten(0, 1))

    @torch.no_grad()
    def solve(self, ridge: float = 1e-3) -> None:
        """Set the matrices."""
        k, d = self._student.config.num_senses, self._student.config.n_embd
        self._squares.diagonal().add_(ridge * self._squares.diagonal().mean())
        solved = torch.cholesky_solve(self._products, torch.linalg.cholesky(self._squares))  # [k·d, d]
        self._student.senses.direct.weight.copy_(solved.view(k, d, d).transpose(1, 2).reshape(k * d, d))
