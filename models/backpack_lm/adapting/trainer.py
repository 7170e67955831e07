"""The run: seeded, stopped and resumed at any moment, with a log."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backpack_lm.adapting.adapter import begin_after
from backpack_lm.adapting.loss import distillation
from backpack_lm.adapting.recipe import AdaptRecipe
from backpack_lm.adapting.student import LeastSquares, Student, start_weights
from backpack_lm.adapting.teacher_cache import InOrder, NumberedRows, TeacherBatch, TeacherCache
from backpack_lm.adapting.words import kept_word_states
from backpack_lm.config import BackpackConfig
from backpack_lm.installed import ADAPTER
from backpack_lm.manifest import file_digest
from backpack_lm.model import Trunk
from backpack_lm.training.data import Ids, Rows
from backpack_lm.training.muon import BlockMuon
from backpack_lm.training.trainer import CHECKPOINT, LOG, append_line, load_checkpoint, write_checkpoint

SAVE_SECONDS = 50.0
HELD_OUT_ROWS = 8


@dataclass(frozen=True, slots=True)
class Teacher:
    """A Transformer: its trunk, the embedding [V, d] that scores its output, and a digest of its files."""

    trunk: Trunk
    embedding: Tensor
    digest: str


@dataclass(frozen=True, slots=True)
class AdaptStep:
    """What one step reports: `divergence` from the teacher and cross entropy with the text, in nats a token."""

    step: int
    divergence: float
    cross_entropy: float
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Cross entropy of a text that isn't trained on, in nats a token: the Backpack's, and the teacher's."""

    backpack: float
    teacher: float


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds: `reading` the rows of a step for the first time, a step with the trunk `frozen`, and what `tuning` its
    layers adds to that."""

    reading: float
    frozen: float
    tuning: float


class AdaptTrainer:
    """Adapts a Transformer in `folder`; goes on from the checkpoint found there."""

    def __init__(
        self, teacher: Teacher, config: BackpackConfig, recipe: AdaptRecipe, rows: Rows,
        held_out: Mapping[str, Ids], folder: Path, cache: Path, device: str = "cpu", after: Path | None = None,
    ) -> None:  # fmt: skip
        """`cache` holds what can be made again, states of words and rows: runs may share it. The run begins with what
        the adapter `after` has learnt, if there is one.

        Raises CheckpointError for an adapter of another Transformer or shape; ValueError if a source is too short for a
        row, or a checkpoint was made by another run; OSError if the disk has no room for the cache.
        """
        rows.check(recipe.row_tokens)
        self.recipe, self.folder, self.config = recipe, folder, config
        self.dtype, self.device = recipe.precision.dtype(), torch.device(device)
        self.trunk = teacher.trunk.to(self.device).requires_grad_(False)
        self.embedding = teacher.embedding.detach().to(self.device, self.dtype)
        assert config.eos_token_id is not None, "texts begin with it"
        self._end_of_text, depth = config.eos_token_id, teacher.trunk.spec.depth
        self.layers = kept_layers(config, recipe)
        self._word_layers = recipe.resolved_word_layers(depth)
        self.made_by: dict[str, Any] = {
            "config": config.to_json(),
            "recipe": recipe.to_json(),
            "text": rows.text(),
            "teacher": teacher.digest,
        }
        self._after = after
        if after is not None:
            self.made_by["after"] = file_digest(after / ADAPTER)
        of_teacher = [teacher.digest, recipe.precision]
        of_rows = [*of_teacher, self.layers, recipe.row_tokens, self._end_of_text]
        self._words_file = cache / f"words-{_key(*of_teacher, self._word_layers, self._end_of_text)}.bin"
        self._rows_folder = cache / f"rows-{_key(*of_rows, recipe.seed, rows.text())}"
        folder.mkdir(parents=True, exist_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        words = kept_word_states(self.trunk, self._word_layers, self._end_of_text, self.dtype, self._words_file)
        self._words = words.to(self.device)
        self.rows = self._cached(rows, recipe.distinct_rows, self._rows_folder)
        self._held_out = {
            name: self._cached(
                InOrder(ids), min(HELD_OUT_ROWS, (len(ids) - 1) // recipe.row_tokens),
                cache / f"held-out-{name}-{_key(*of_rows, len(ids))}",
            )
            for name, ids in held_out.items()
            if len(ids) > recipe.row_tokens
        }  # fmt: skip
        self._teachers_loss: dict[str, float] = {}
        self._begin()
        if self.checkpoint.exists():
            self.step = load_checkpoint(self.checkpoint, self.made_by, self.student, self.optimizers)
            self.has_first_senses = True

    def _cached(self, rows: NumberedRows, count: int, folder: Path) -> TeacherCache:
        return TeacherCache(
            self.trunk, self.embedding, self.layers, rows, self._end_of_text, count, self.recipe.row_tokens, folder
        )

    def _begin(self) -> None:
        """Anew, from the recipe's seed."""
        torch.manual_seed(self.recipe.seed)
        recipe = self.recipe
        self.student = Student(
            self.config, self.trunk, self._words, self._word_layers, recipe.sense_inner, self.layers,
            recipe.tuned_layers,
        ).to(self.device)  # fmt: skip
        if self._after is not None:
            begin_after(self.student, self._after, self.made_by["teacher"])
        self.optimizers = self._muon_and_adamw()
        self.step, self.has_first_senses = 0, self._after is not None

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def fit_first_senses(self) -> Iterator[float]:
        """Find the senses that training begins with, and save them; yields the share that is done. Nothing to do for a
        run that has them."""
        if self.has_first_senses:
            return
        torch.manual_seed(self.recipe.seed)
        start_weights(self.student.weights, self.recipe.sense_theta)
        equations, per = LeastSquares(self.student), self.recipe.rows_per_step
        count = min(self.recipe.start_rows, self.recipe.distinct_rows)
        for at in range(0, count, per):
            batch = self.rows.take(range(at, min(at + per, count)))
            equations.add(batch.ids, batch.states)
            yield min(at + per, count) / count
        equations.solve()
        self.has_first_senses = True
        self.save()

    def run(self) -> Iterator[AdaptStep]:
        """Take the remaining steps, yielding each; saves about once a minute, and at the end."""
        saved = time.monotonic()
        while self.step < self.recipe.steps:
            done = self.take_step()
            append_line(self.folder / LOG, asdict(done))
            if time.monotonic() - saved > SAVE_SECONDS or self.step == self.recipe.steps:
                self.save()
                saved = time.monotonic()
            yield done

    def row_numbers(self, step: int) -> list[int]:
        """The rows of a step: all in order, then again and again, each time shuffled anew."""
        count, per = self.recipe.distinct_rows, self.recipe.rows_per_step
        found: list[int] = []
        for at in range(step * per, (step + 1) * per):
            epoch, place = divmod(at, count)
            found.append(
                int(np.random.default_rng([self.recipe.seed, epoch]).permutation(count)[place] if epoch else place)
            )
        return found

    def take_step(self, tune: bool | None = None) -> AdaptStep:
        """One step, of the trunk's layers, too, if `tune` or else the recipe says so. Raises FloatingPointError."""
        recipe, began = self.recipe, time.perf_counter()
        tune = self.step >= recipe.tuned_from if tune is None else tune
        batch = self.rows.take(self.row_numbers(self.step))
        means = self._student_means(batch, tune)
        means[0].backward()
        divergence, cross_entropy = means[0].item() - batch.entropy.mean().item(), means[1].item()
        if not math.isfinite(divergence):
            raise FloatingPointError(f"the divergence is {divergence} at step {self.step}; lower the learning rates")
        for some in self._own_and_tuned():
            nn.utils.clip_grad_norm_(some, recipe.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                scale = recipe.tuned_scale if group["tuned"] else recipe.scale
                group["lr"] = group["peak_lr"] * scale(self.step)
            optimizer.step()
        self.student.zero_grad(set_to_none=True)  # not the optimizers': Muon holds views, which have other gradients
        self.step += 1
        tokens = recipe.rows_per_step * recipe.row_tokens
        return AdaptStep(self.step, divergence, cross_entropy, tokens, time.perf_counter() - began)

    def _student_means(self, batch: TeacherBatch, tune: bool) -> Tensor:
        """The student's two cross entropies, with the teacher's predictions and with the text [2]; see `loss.py`."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            o = self.student(batch.ids, batch.states, tune)
        return self._means(o, batch)

    def _means(self, o: Tensor, batch: TeacherBatch) -> Tensor:
        expected, targets = batch.expected.flatten(0, 1), batch.targets.flatten()
        return distillation(o.flatten(0, 1), expected, targets, self.embedding, self.recipe.cross_entropy)

    @torch.no_grad()
    def held_out(self) -> dict[str, HeldOut]:
        """How well texts are read that aren't trained on, HELD_OUT_ROWS of each source."""
        found, tune = {}, self.step > self.recipe.tuned_from
        for name, rows in self._held_out.items():
            batch = rows.take(range(rows.count))
            if name not in self._teachers_loss:
                self._teachers_loss[name] = self._means(batch.states[:, :, -1], batch)[1].item()
            found[name] = HeldOut(self._student_means(batch, tune)[1].item(), self._teachers_loss[name])
        return found

    def measure(self) -> StepCosts:
        """Measure steps. Begins anew behind it."""
        per = self.recipe.rows_per_step
        with TemporaryDirectory(dir=self._rows_folder.parent) as scratch:  # nothing of it was read before
            began = time.perf_counter()
            self._cached(self.rows.source, per, Path(scratch)).take(range(per))
            reading = time.perf_counter() - began

        def taken(tune: bool) -> float:
            for _ in range(2):
                self.step = 0
                seconds = self.take_step(tune).seconds
            return seconds

        frozen = taken(tune=False)
        tuned = taken(tune=True) if self.recipe.tuned_layers else frozen
        self._begin()
        return StepCosts(reading, frozen, max(0.0, tuned - frozen))

    def _own_and_tuned(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The sense path's parameters, and the trunk's."""
        student = self.student
        own = [*student.senses.parameters(), *student.weights.parameters()]
        return own, [*student.upper.parameters(), *student.norm.parameters()]

    def _muon_and_adamw(self) -> list[torch.optim.Optimizer]:
        recipe, k = self.recipe, self.config.num_senses
        named = dict(self.student.named_parameters())
        matrices = [
            (named["senses.c_fc.weight"], 1, self._words.shape[1]),
            (named["senses.c_proj.weight"], 0, k),
            (named["senses.direct.weight"], 0, k),
            *(
                (each, 0, 2 * k if self.student.weights.together else k)  # heads of queries and keys, each by itself
                for name, each in named.items()
                if name.startswith("weights.c_") and each.ndim > 1
            ),
        ]
        taken = {id(weight) for weight, _, _ in matrices}
        own, tuned = self._own_and_tuned()
        rest = [{"params": [weight for weight in own if id(weight) not in taken], "lr": recipe.lr, "tuned": False}]
        if recipe.tuned_layers:
            rest.append({"params": tuned, "lr": recipe.tuned_lr, "tuned": True})
        muon = BlockMuon(matrices, recipe.matrix_lr, recipe.weight_decay)
        muon.param_groups[0]["tuned"] = False
        adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True)
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]
        return [muon, adamw]

    def save(self) -> None:
        """Write the checkpoint."""
        write_checkpoint(self.checkpoint, self.made_by, self.step, self.student, self.optimizers)


def kept_layers(config: BackpackConfig, recipe: AdaptRecipe) -> list[int]:
    """The layers whose states of the text are kept: those that are read, the last, and that below the trained ones."""
    depth = config.trunk.depth
    return sorted({*sum(config.read_layers, ()), depth, depth - recipe.tuned_layers})


def fit_to_budget(recipe: AdaptRecipe, seconds: float, costs: StepCosts, most_rows: int) -> AdaptRecipe:
    """The recipe with as many steps and distinct rows as fit into so many seconds.

    Each row is taken three times, more often where the disk holds no more than `most_rows`.
    """
    per_step = costs.frozen + recipe.tuned_share * costs.tuning
    reading_steps = min(seconds / (costs.reading + 3 * per_step), most_rows / recipe.rows_per_step)
    steps = max(1, int((seconds - reading_steps * costs.reading) / per_step))
    return replace(recipe, steps=steps, distinct_rows=max(1, int(reading_steps)) * recipe.rows_per_step)


def _key(*values: Any) -> str:
    """A name for files that were made by these values alone."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
