"""The run: seeded, stopped and resumed at any moment, with a log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backpack_lm import strict_json
from backpack_lm.adapting.lessons import InOrder, Lesson, Lessons
from backpack_lm.adapting.loss import distillation
from backpack_lm.adapting.recipe import AdaptRecipe
from backpack_lm.adapting.student import LeastSquares, Student, start_weights
from backpack_lm.adapting.words import kept_word_states
from backpack_lm.config import BackpackConfig
from backpack_lm.model import Trunk
from backpack_lm.training.data import Ids, Rows
from backpack_lm.training.muon import BlockMuon
from backpack_lm.training.trainer import CHECKPOINT, read_checkpoint

SAVE_SECONDS = 50.0
HELD_OUT_ROWS = 8
_AT_ONCE = 4
"""Held-out rows that are computed at a time."""


@dataclass(frozen=True, slots=True)
class AdaptStep:
    """What one step reports: `divergence` from the original and cross entropy with the text, in nats a token."""

    step: int
    divergence: float
    cross_entropy: float
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Cross entropy of a text that isn't trained on, in nats a token: the Backpack's, and the original's."""

    backpack: float
    original: float


class AdaptTrainer:
    """Adapts a Transformer in `folder`; goes on from the checkpoint found there."""

    def __init__(
        self, trunk: Trunk, embedding: Tensor, config: BackpackConfig, recipe: AdaptRecipe, rows: Rows,
        held_out: Mapping[str, Ids], folder: Path, kept: Path | None = None, device: str = "cpu",
    ) -> None:  # fmt: skip
        """`kept` is a folder of what can be made again, by default one in `folder`: runs on the same text may share it.

        Raises ValueError if a source is too short for a row, or a checkpoint was made by another recipe.
        """
        rows.check(recipe.row)
        self.recipe, self.folder, self.config, self.rows = recipe, folder, config, rows
        self.made_by: dict[str, Any] = {"config": config.to_json(), "recipe": recipe.to_json(), "text": rows.text()}
        self.kept, self.dtype, self.device = kept or folder / "kept", recipe.precision.dtype(), torch.device(device)
        self.kept.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._trunk = trunk.to(self.device).requires_grad_(False)
        self.embedding = embedding.detach().to(self.device, self.dtype)
        assert config.eos_token_id is not None, "texts begin with it"
        self._before, depth = config.eos_token_id, trunk.spec.depth
        self.layers = sorted({*sum(config.read_layers, ()), depth, depth - recipe.tuned_layers})
        self._word_layers = recipe.words_of(depth)
        file = self.kept / f"words-{'-'.join(map(str, self._word_layers))}.bin"
        self._words = kept_word_states(self._trunk, self._word_layers, self._before, self.dtype, file).to(self.device)
        self.lessons = self._lessons(rows, recipe.fresh, "rows")
        self._held_out = {
            name: self._lessons(InOrder(ids), min(HELD_OUT_ROWS, (len(ids) - 1) // recipe.row), f"held-out-{name}")
            for name, ids in held_out.items()
            if len(ids) > recipe.row
        }
        self.reset()
        if self.checkpoint.exists():
            self._resume()

    def _lessons(self, rows: Rows | InOrder, count: int, name: str) -> Lessons:
        return Lessons(
            self._trunk, self.embedding, self.layers, rows, self._before, count, self.recipe.row, self.kept / name
        )

    def reset(self) -> None:
        """Begin anew, from the recipe's seed."""
        torch.manual_seed(self.recipe.seed)
        recipe = self.recipe
        self.student = Student(
            self.config, self._trunk, self._words, self._word_layers, recipe.inner, self.layers, recipe.tuned_layers
        ).to(self.device)
        self.optimizers = self._muon_and_adamw()
        self.step = 0

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def start(self) -> Iterator[float]:
        """Find the senses that a run begins with; yields the share that is done. Nothing to do if it has begun."""
        if self.step:
            return
        torch.manual_seed(self.recipe.seed)
        start_weights(self.student.weights, self.recipe.sense_theta)
        equations, per = LeastSquares(self.student), self.recipe.rows_per_step
        count = min(self.recipe.start_rows, self.recipe.fresh)
        for at in range(0, count, per):
            lesson = self.lessons.take(range(at, min(at + per, count)))
            equations.add(lesson.ids, lesson.states)
            yield min(at + per, count) / count
        equations.solve()

    def run(self) -> Iterator[AdaptStep]:
        """Take the remaining steps, yielding each; saves about once a minute, and at the end."""
        saved = time.monotonic()
        while self.step < self.recipe.steps:
            done = self.take_step()
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(asdict(done)) + "\n")
            if time.monotonic() - saved > SAVE_SECONDS or self.step == self.recipe.steps:
                self.save()
                saved = time.monotonic()
            yield done

    def numbers(self, step: int) -> list[int]:
        """The rows of a step: all in order, then again and again, each time shuffled anew."""
        recipe, found = self.recipe, []
        for at in range(step * recipe.rows_per_step, (step + 1) * recipe.rows_per_step):
            turn, place = divmod(at, recipe.fresh)
            order = np.random.default_rng([recipe.seed, turn]).permutation(recipe.fresh) if turn else None
            found.append(place if order is None else int(order[place]))
        return found

    def take_step(self, tune: bool | None = None) -> AdaptStep:
        """One step, of the trunk's layers, too, if `tune` or else the recipe says so. Raises FloatingPointError."""
        recipe, began = self.recipe, time.perf_counter()
        tune = self.step >= recipe.tuned_from if tune is None else tune
        lesson = self.lessons.take(self.numbers(self.step))
        means = self._means(lesson, tune)
        means[0].backward()
        divergence, cross_entropy = means[0].item() - lesson.entropy.mean().item(), means[1].item()
        if not math.isfinite(divergence):
            raise FloatingPointError(f"the divergence is {divergence} at step {self.step}; lower the learning rates")
        for some in self._own_and_tuned():
            nn.utils.clip_grad_norm_(some, recipe.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                scale = recipe.tuned_scale if group["tuned"] else recipe.scale
                group["lr"] = group["peak_lr"] * scale(self.step)
            optimizer.step()
        self.student.zero_grad(set_to_none=True)  # Muon knows views of the weights alone
        self.step += 1
        tokens = recipe.rows_per_step * recipe.row
        return AdaptStep(self.step, divergence, cross_entropy, tokens, time.perf_counter() - began)

    def _means(self, lesson: Lesson, tune: bool) -> Tensor:
        """The student's two cross entropies, with the original's predictions and with the text [2]; see `loss.py`."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            o = self.student(lesson.ids, lesson.states, tune)
        return self._compared(o, lesson)

    def _compared(self, o: Tensor, lesson: Lesson) -> Tensor:
        expected, targets = lesson.expected.flatten(0, 1), lesson.targets.flatten()
        return distillation(o.flatten(0, 1), expected, targets, self.embedding, self.recipe.cross_entropy)

    @torch.no_grad()
    def held_out(self) -> dict[str, HeldOut]:
        """How well texts are read that aren't trained on, HELD_OUT_ROWS of each source."""
        found, tune = {}, self.step > self.recipe.tuned_from
        for name, lessons in self._held_out.items():
            nats = torch.zeros(2, dtype=torch.float64)
            for at in range(0, lessons.count, _AT_ONCE):
                numbers = range(at, min(at + _AT_ONCE, lessons.count))
                lesson = lessons.take(numbers)
                own, original = self._means(lesson, tune)[1], self._compared(lesson.states[:, :, -1], lesson)[1]
                nats += torch.stack([own, original]).double().cpu() * len(numbers) / lessons.count
            found[name] = HeldOut(*nats.tolist())
        return found

    def seconds(self) -> tuple[float, float, float]:
        """Measure what it takes to read fresh rows of a step, to take a step of rows that were read, and what to train
        the trunk's layers adds to that. Begins anew behind it."""
        per = self.recipe.rows_per_step
        began = time.perf_counter()
        self.lessons.take(range(2 * per))
        reading = (time.perf_counter() - began) / 2

        def taken(tune: bool) -> float:
            self.step = 0
            for _ in range(2):
                seconds = self.take_step(tune).seconds
            return seconds

        frozen = taken(tune=False)
        tuned = taken(tune=True) if self.recipe.tuned_layers else frozen
        self.reset()
        return reading, frozen, max(0.0, tuned - frozen)

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
            *((each, 0, k) for name, each in named.items() if name.startswith("weights.c_") and each.ndim > 1),
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
        """Write the checkpoint: a crash leaves the old one or the new one, never half of one."""
        state = {
            "made_by": json.dumps(self.made_by, sort_keys=True),
            "step": self.step,
            "student": self.student.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.checkpoint)

    def _resume(self) -> None:
        state = read_checkpoint(self.checkpoint)
        before, now = strict_json.parse(state["made_by"]), json.loads(json.dumps(self.made_by))
        if before != now:
            raise ValueError(
                f"{self.checkpoint} was made by another recipe, or from other text: {state['made_by']}; "
                "give the same files and options to go on, or another folder to start anew"
            )
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def within(recipe: AdaptRecipe, seconds: float, costs: tuple[float, float, float], most_fresh: int) -> AdaptRecipe:
    """The recipe with as many steps and fresh rows as fit into so many seconds, by what `AdaptTrainer.seconds` found.

    Each row is taken three times, more often where the disk holds no more than `most_fresh`.
    """
    reading, frozen, tuning = costs
    per_step = frozen + recipe.tuned_share * tuning
    per_fresh = reading + 3 * per_step
    fresh_steps = min(seconds / per_fresh, most_fresh / recipe.rows_per_step)
    steps = max(1, int((seconds - fresh_steps * reading) / per_step))
    return replace(recipe, steps=steps, fresh=max(recipe.rows_per_step, int(fresh_steps) * recipe.rows_per_step))
