"""The model that an experiment or the lab works on, and the same model steered by edits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from backpack_lm.checkpoint import load, load_table
from backpack_lm.config import BackpackConfig
from backpack_lm.manifest import TOKENIZER, Manifest
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import Edit, ReleaseContent, RevisionContent
from backpack_lm.tokenizer import Tokenizer, WordError, WordPolicy


@dataclass(frozen=True, slots=True)
class LabModel:
    """A servable model folder, read: the model with its sense table, tokenizer and fingerprint."""

    manifest: Manifest
    model: Backpack
    table: SenseTable
    tokenizer: Tokenizer

    @classmethod
    def read(cls, folder: Path) -> LabModel:
        """Raises ManifestError, CheckpointError or ValueError if there is no servable model in the folder."""
        manifest, model = Manifest.read(folder), load(folder)
        table, tokenizer = load_table(folder, model, manifest), Tokenizer.read(folder / TOKENIZER, manifest.tokenizer)
        return cls(manifest, model, table, tokenizer)

    @property
    def config(self) -> BackpackConfig:
        return self.model.config

    @property
    def head(self) -> Tensor:
        """E without the vocabulary's padding: [tokens, d]."""
        return self.model.embedding[: self.config.tokens]

    def overlay(self, *edits: Edit) -> Overlay:
        """What a replica compiles from a release of these edits. Raises PatchError if it would be refused."""
        release = ReleaseContent((RevisionContent(self.manifest.fingerprint, edits),)) if edits else ReleaseContent()
        shape = replace(self.manifest.shape, spell=self.tokenizer.piece)
        release.validate(shape)
        return Overlay.compile(release, self.table, shape.name)

    def token(self, word: str) -> int:
        """The one id of " word". Raises WordError if it has several."""
        return self.tokenizer.word_ids(word)[0]

    def shown(self, token: int) -> str:
        """A token in a table: without the spaces around it, quoted if it has nothing else."""
        piece = self.tokenizer.piece(token)
        return piece.strip() or repr(piece)

    def word_ids(self, word: str) -> tuple[int, ...]:
        """All ids of " word"."""
        return self.tokenizer.word_ids(word, WordPolicy.ALL)

    def check_names(self, prompt: str, word: str) -> None:
        """Raises ValueError for a prompt without the word's token: an edit of its senses would change nothing."""
        if (token := self.token(word)) not in self.ids(prompt):
            raise ValueError(f"prompt {prompt!r} doesn't hold {word!r} as the token {self.tokenizer.piece(token)!r}")

    def single_token_words(self, words: Iterable[str]) -> list[str]:
        """Those of the words that are one token: only they have sense vectors of their own."""
        return [word for word in words if self._is_token(word)]

    def _is_token(self, word: str) -> bool:
        try:
            self.token(word)
        except WordError:
            return False
        return True

    def ids(self, text: str) -> list[int]:
        """Ids of a prompt, its last ones if it is longer than the context. Raises ValueError if it is empty."""
        ids = self.tokenizer.encode_prompt(text)
        if not ids:
            raise ValueError(f"{text!r} has no tokens; a prompt needs at least one")
        return ids[-self.config.n_positions :]


@dataclass(frozen=True, slots=True)
class SteeredModel:
    """A subject under an overlay, as a language model: what `perplexity` and `log_probabilities` take.

    Biases b are one more dimension, in which every output is 1: logits = [o, 1]·[E, b].
    """

    subject: LabModel
    overlay: Overlay

    @property
    def config(self) -> BackpackConfig:
        return self.subject.config

    @property
    def embedding(self) -> Tensor:
        head = self.subject.head
        if self.overlay.bias is None:
            return head
        return torch.cat([head, self.overlay.biased(head.new_zeros(len(head)))[:, None]], 1)

    def mix(self, ids: Tensor) -> Tensor:
        """o [B, T, d], as `Backpack.mix`, but its senses read from the table."""
        return self.mix_by(self.subject.model.sense_weights(ids), ids)

    def mix_by(self, alpha: Tensor, ids: Tensor) -> Tensor:
        """`mix` for sense weights α [B, k, T, T] that were computed before."""
        subject = self.subject
        senses = self.overlay.replace(ids, subject.table.rows[ids])
        if self.overlay.topics:
            alpha = alpha * self.overlay.multipliers(ids, senses, subject.model.embedding).movedim(-1, 1)
        mixed = (alpha @ senses.transpose(1, 2)).sum(1)
        return mixed if self.overlay.bias is None else torch.cat([mixed, torch.ones_like(mixed[..., :1])], -1)


class Prompts:
    """Prompts whose next token is asked for under one patch after another.

    α doesn't depend on a patch, so the trunk runs once; an evaluation is the mix at each prompt's last position.
    """

    @torch.inference_mode()
    def __init__(self, subject: LabModel, prompts: Sequence[str | Sequence[int]]) -> None:
        """Prompts as texts or ids."""
        if not prompts:
            raise ValueError("no prompts; give at least one")
        self.subject = subject
        rows = [subject.ids(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        self.last = torch.tensor([len(row) - 1 for row in rows])
        self.ids = torch.zeros(len(rows), int(self.last.max()) + 1, dtype=torch.long)  # [P, T], padded behind
        for at, row in enumerate(rows):
            self.ids[at, : len(row)] = torch.tensor(row)
        self._each = torch.arange(len(rows))
        self.alpha = subject.model.sense_weights(self.ids)[self._each, :, self.last]  # [P, k, T], 0 behind `last`

    @torch.inference_mode()
    def mixed(self, overlay: Overlay) -> Tensor:
        """o [P, d] at each prompt's last position."""
        senses = overlay.replace(self.ids, self.subject.table.rows[self.ids])  # [P, T, k, d]
        alpha = self.alpha
        if overlay.topics:
            multipliers = overlay.multipliers(self.ids, senses, self.subject.model.embedding)  # [P, T, T, k]
            alpha = alpha * multipliers[self._each, self.last].transpose(1, 2)
        return torch.einsum("pkt,ptkd->pd", alpha, senses)

    def logits(self, overlay: Overlay, tokens: Sequence[int]) -> Tensor:
        """Logits [P, len(tokens)] of some tokens."""
        biases = torch.tensor([overlay.bias_of(token) for token in tokens])
        return self.mixed(overlay) @ self.subject.model.embedding[list(tokens)].t() + biases

    def log_probabilities(self, overlay: Overlay) -> Tensor:
        """log p of the next token: [P, tokens], double."""
        return overlay.biased(self.mixed(overlay) @ self.subject.head.t()).double().log_softmax(-1)
