"""Measures what a release does to ordinary text, which it should leave alone."""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backpack_lm.compare import logits_in_pieces
from backpack_lm.manifest import HELD_OUT
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.strict_json import UTF8
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.trunk_pass import TrunkPass

EXCERPTS, EXCERPT_TOKENS = 8, 256
"""Of the shipped text, what a release is judged on: 2,040 predictions."""


@dataclass(frozen=True, slots=True)
class MovedWord:
    """A token, and its mean probability as the next one over the text: unpatched, and under the release."""

    token: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class SideEffects:
    """What a release does to text: the perplexity of its `tokens` predicted tokens unpatched and under the release,
    and the words whose mean probability moved most, largest move first.

    A token of the text that the release forbids counts as guessed among all words: to forbid a rare word costs
    little, to forbid the common ones much.
    """

    tokens: int
    before: float
    after: float
    moved: tuple[MovedWord, ...]

    @property
    def change(self) -> float:
        """Of the perplexity, as a share of it: 0.05 is 5 % more."""
        return self.after / self.before - 1


class OrdinaryText:
    """Rows of text that were read by the trunk, to be judged under any number of releases.

    `rows` are ids [T ≥ 2] each. With `keep`, the passes of the trunk stay in memory, about T·k·(d + T)·4 bytes a row,
    and the next release costs a mix and the head; without, each call reads the text again.
    """

    def __init__(self, model: Backpack, table: SenseTable, rows: Sequence[Tensor], keep: bool = True) -> None:
        self._model, self._table, self._rows, self._keep = model, table, rows, keep
        self._head = model.embedding.detach()[: model.config.tokens]
        self._passes: dict[int, TrunkPass] = {}
        self._plain: dict[int, RowReading] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def under(self, overlay: Overlay, limit: int) -> SideEffects:
        """What a release does to the text; `limit` words at most."""
        return self.effects([self.read(number, overlay) for number in range(len(self))], limit)

    @torch.inference_mode()
    def effects(self, read: Sequence[tuple[RowReading, RowReading]], limit: int) -> SideEffects:
        """The same of all rows, read before."""
        before = RowReading.together([plain for plain, _ in read])
        after = RowReading.together([steered for _, steered in read])
        steered = after.logs.masked_fill(after.logs == -math.inf, -math.log(len(self._head)))
        count = len(before.logs)
        move = after.probability - before.probability
        moved = move.abs().topk(min(limit, len(self._head))).indices.tolist()
        one, other = before.probability / count, after.probability / count
        words = [MovedWord(token, float(one[token]), float(other[token])) for token in moved if move[token]]
        return SideEffects(count, _perplexity_of(before.logs), _perplexity_of(steered), tuple(words))

    @torch.inference_mode()
    def read(self, number: int, overlay: Overlay) -> tuple[RowReading, RowReading]:
        """A row unpatched and under a release."""
        row = self._rows[number]
        trunk = self._passes.get(number) or TrunkPass(self._model, self._table, row[:-1])
        if number not in self._plain:
            self._plain[number] = self._predict(trunk.base, row[1:])
        if self._keep:
            self._passes[number] = trunk
        first, changed = trunk.under(overlay)
        if first == trunk.predictions and overlay.bias is None:
            return self._plain[number], self._plain[number]
        return self._plain[number], self._predict(torch.cat([trunk.base[:first], changed]), row[1:], overlay)

    def _predict(self, outputs: Tensor, targets: Tensor, overlay: Overlay | None = None) -> RowReading:
        """Outputs [T, d], with an overlay's biases, and the tokens [T] that came."""
        read = []
        for at, logits in logits_in_pieces(outputs, self._head):
            logs = (overlay.biased(logits) if overlay else logits).log_softmax(1)
            chosen = logs.gather(1, targets[at : at + len(logits), None])[:, 0]
            read.append(RowReading(chosen, logs.exp_().sum(0).double()))
        return RowReading.together(read)


@dataclass(frozen=True, slots=True)
class RowReading:
    """Of the predictions of a row, or of several: log p of the tokens that came [T], and the sum of each token's
    probability [V]."""

    logs: Tensor
    probability: Tensor

    @classmethod
    def together(cls, some: Sequence[RowReading]) -> RowReading:
        return cls(torch.cat([one.logs for one in some]), torch.stack([one.probability for one in some]).sum(0))


def shipped(folder: Path) -> Path:
    """The held-out text that lies in a model folder. Raises ValueError, saying what to give, if there is none."""
    if not (path := folder / HELD_OUT).exists():
        raise ValueError(
            f"{folder} has no {HELD_OUT}; give text with --text: JSON lines or plain, like what the model reads, "
            "and best of what it wasn't trained on"
        )
    return path


def plain(path: Path) -> str:
    """All of a text file, .xz or not. Raises ValueError naming it if it isn't UTF-8, or not whole."""
    try:
        if path.suffix != ".xz":
            return path.read_text(UTF8)
        with lzma.open(path, "rt", encoding=UTF8) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't UTF-8 text: {error}") from None
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} can't be read to its end: {error}") from None


def excerpts(text: str, tokenizer: Tokenizer, context: int) -> list[Tensor]:
    """EXCERPTS rows of at most EXCERPT_TOKENS ids, or `context` if that is less, evenly spread over a text; each
    begins where a line does. Fewer of a text that is too short for them."""
    length = min(EXCERPT_TOKENS, context)
    starts = (_line_after(text, len(text) * number // EXCERPTS) for number in range(EXCERPTS))
    ids = (tokenizer.encode_prompt(text[at : at + 16 * length])[:length] for at in dict.fromkeys(starts))
    return [torch.tensor(row) for row in ids if len(row) > 1]


def rows_of(ids: Tensor, length: int) -> list[Tensor]:
    """Rows of length + 1 ids of a stream [N], each beginning with the last one of the row before."""
    return list(ids[: (len(ids) - 1) // length * length + 1].unfold(0, length + 1, length))


def _line_after(text: str, at: int) -> int:
    return at if not at else text.find("\n", at) + 1 or len(text)


def _perplexity_of(logs: Tensor) -> float:
    return float((-logs.double().mean()).exp())
