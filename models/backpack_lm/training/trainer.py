"""The training loop: seeded, resumable to the bit, with a log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backpack_lm import strict_json
from backpack_lm.config import BackpackConfig
from backpack_lm.kernels import Precision
from backpack_lm.model import Backpack, TransformerTwin
from backpack_lm.training.data import Rows
from backpack_lm.training.loss import head_loss
from backpack_lm.training.muon import BlockMuon, matrices

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides what a run computes.

    Learning rates warm up linearly, stay, and decay linearly to zero over the last `decay` of the steps.
    Rows have `short_row` tokens for the first `long_from` of the steps, then fill the context. Weights are
    float32; `precision` is that of the products.
    """

    steps: int
    seed: int = 0
    tokens_per_step: int = 2048
    tokens_per_pass: int = 2048
    short_row: int = 256
    long_from: float = 0.7
    lr: float = 3e-3
    matrix_lr: float = 6e-3
    weight_decay: float = 0.05
    warmup: float = 0.03
    decay: float = 0.5
    clip: float = 1.0
    precision: Precision = Precision.FLOAT32

    def scale(self, step: int) -> float:
        """What the learning rates are multiplied by at a step."""
        return warm_up_and_decay(step, self.steps, self.warmup, self.decay)

    def row_length(self, step: int, context: int) -> int:
        return context if step >= self.long_from * self.steps else min(self.short_row, context)


def warm_up_and_decay(step: int, steps: int, warmup: float, decay: float) -> float:
    """What a learning rate is multiplied by at a step: it rises linearly over the first `warmup` of the steps, stays,
    and falls linearly to zero over the last `decay` of them."""
    up = (step + 1) / max(1.0, warmup * steps)
    down = (steps - step) / max(1.0, decay * steps)
    return min(1.0, up, down)


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one step reports."""

    step: int
    loss: float
    tokens: int
    seconds: float


class Trainer:
    """Trains a Backpack, or its Transformer twin, in `folder`; goes on from the checkpoint found there.

    A run `after` another, that run's folder, begins with its weights: a recipe in two parts. Raises ValueError
    if a source is too short for a row, a checkpoint was made by another recipe, config or kind of model or from
    other text, or the run before isn't finished.
    """

    def __init__(
        self,
        config: BackpackConfig,
        recipe: Recipe,
        rows: Rows,
        folder: Path,
        twin: bool,
        after: Path | None = None,
    ) -> None:
        rows.check(config.n_positions)  # the last steps' rows fill the context
        self.recipe, self.rows, self.folder = recipe, rows, folder
        self.made_by: dict[str, Any] = {
            "config": config.to_json(),
            "recipe": asdict(recipe),
            "twin": twin,
            "text": rows.text(),
        }
        torch.manual_seed(recipe.seed)
        self.model: Backpack | TransformerTwin = TransformerTwin(config) if twin else Backpack(config)
        if after is not None:
            self._begin_run(after)
        self.optimizers = _optimizers(self.model, recipe)
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._load_checkpoint()

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def run(self, save_every: int = 50) -> Iterator[StepStats]:
        """Take the remaining steps, yielding each; saves every so often, and at the end."""
        while self.step < self.recipe.steps:
            started = time.perf_counter()
            loss = self._take_step()
            self.step += 1
            done = StepStats(self.step, loss, self.recipe.tokens_per_step, time.perf_counter() - started)
            append_line(self.folder / LOG, asdict(done))
            if self.step % save_every == 0 or self.step == self.recipe.steps:
                self.save()
            yield done

    def _take_step(self) -> float:
        recipe, model = self.recipe, self.model
        length = recipe.row_length(self.step, model.config.n_positions)
        count = max(1, recipe.tokens_per_step // length)
        per_pass = max(1, recipe.tokens_per_pass // length)
        rows = torch.from_numpy(self.rows.at(self.step, count, length))
        dtype, total = recipe.precision.dtype(), 0.0
        for part in rows.split(per_pass):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                hidden = model.mix(part[:, :-1]).flatten(0, 1)
            loss = head_loss(hidden, model.embedding, part[:, 1:].flatten(), dtype) * (len(part) / count)
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"loss is {total} at step {self.step}; lower the learning rates")
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * recipe.scale(self.step)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return total

    def save(self) -> None:
        """Write the checkpoint."""
        write_checkpoint(self.checkpoint, self.made_by, self.step, self.model, self.optimizers)

    def _begin_run(self, after: Path) -> None:
        if not (after / CHECKPOINT).exists():
            raise ValueError(f"{after} holds no {CHECKPOINT} to begin after")
        state = read_checkpoint(after / CHECKPOINT)
        before = strict_json.parse(state["made_by"])
        for what in ("config", "twin"):
            if before[what] != self.made_by[what]:
                raise ValueError(f"{after} has {what} {before[what]}, this run {self.made_by[what]}: give the same")
        if state["step"] < before["recipe"]["steps"]:
            raise ValueError(f"{after} has taken {state['step']} of {before['recipe']['steps']} steps: finish it first")
        self.model.load_state_dict(state["model"])
        self.made_by["after"] = before

    def _load_checkpoint(self) -> None:
        self.step = load_checkpoint(self.checkpoint, self.made_by, self.model, self.optimizers)


def write_checkpoint(
    file: Path, made_by: dict[str, Any], step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Write the state of a run: a crash leaves the old file or the new one, never half of one."""
    state = {
        "made_by": json.dumps(made_by, sort_keys=True),
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(file)


def load_checkpoint(
    file: Path, made_by: dict[str, Any], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> int:
    """Put the state of a run into a model and its optimizers; its step. Raises ValueError if another run wrote it."""
    state = read_checkpoint(file)
    before, now = strict_json.parse(state["made_by"]), json.loads(json.dumps(made_by))
    if "text" not in before:  # checkpoints of earlier versions don't tell
        del now["text"]
    if before != now:
        raise ValueError(
            f"{file} was made by another recipe, or from other text: {state['made_by']}; "
            "give the same files and options to go on, or another folder to start anew"
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def append_line(file: Path, values: dict[str, Any]) -> None:
    """Add a line of JSON to a run's log."""
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(values) + "\n")


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The state of a run, as it was saved. Raises ValueError naming the file if it is damaged."""
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # torch raises many kinds, and tells of its insides
        raise ValueError(f"{file} is damaged, or no state of a run; remove it, and the run begins anew") from None
    return state


def _optimizers(model: Backpack | TransformerTwin, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, AdamW without decay for embeddings, biases and norms."""
    muon = BlockMuon(matrices(model), recipe.matrix_lr, recipe.weight_decay)
    taken = {id(weight) for weight, _, _ in muon.weights}
    rest = [weight for weight in model.parameters() if id(weight) not in taken]
    adamw = torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]
