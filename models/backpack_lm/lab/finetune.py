"""Sense finetuning (Hewitt et al., arXiv 2402.06155): canonical examples become a few deltas of sense vectors.

For each example the cells are chosen that its targets attend to most and ordinary text least; one delta for each
cell in the union is learnt, everything else is frozen: loss on the examples, plus the divergence from the model as
it was on background text, within a loss budget on held-out text.

Training is logits = (o + A·δ) Eᵀ over the positions that the cells influence (`influence.py`); the trunk runs once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack_lm.counted import counted
from backpack_lm.lab.examples import CanonicalExample
from backpack_lm.lab.influence import Positions, choose_cells, positions_of
from backpack_lm.lab.lab_model import LabModel, Prompts, SteeredModel
from backpack_lm.lab.progress import Watch
from backpack_lm.patch import AddEdit, Cell, Edit, PatchLimits, Vector
from backpack_lm.reports.report import Report, Table
from backpack_lm.training.trainer import read_checkpoint

SHORTENINGS = 8  # halvings that find how long deltas may be within a budget


@dataclass(frozen=True, slots=True)
class Finetuning:
    """What decides a run. `cells` of each example, `penalty` λ of a cell's weight in ordinary text, `budget` ε."""

    cells: int = 8
    penalty: float = 1000.0
    budget: float = 1e-3
    steps: int = 300
    rate: float = 0.003  # Adam's, in units of the typical norm of a sense's vectors
    divergence: float = 1.0  # weight of the divergence beside the loss on the examples
    check_every: int = 10
    batch: int = 512  # background positions a step
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Checked:
    """The state of a run when it was checked: loss on the examples, held-out loss over that of the model − 1."""

    step: int
    loss: float
    change: float


@dataclass(frozen=True, slots=True)
class Finetuned:
    """The cells, their deltas [cells, d] at the best check within the budget, and every check.

    It is `reached` if after every example's prompt the first token of its target is the likeliest; `missed` are
    the prompts after which it isn't. `reached_change` is the held-out loss's change at the positions that the
    cells influence: what a budget over all text doesn't show.
    """

    cells: list[Cell]
    deltas: Tensor
    best: Checked
    checks: list[Checked]
    missed: tuple[str, ...] = ()
    reached_change: float = 0.0

    @property
    def reached(self) -> bool:
        return not self.missed

    @property
    def reason(self) -> str:
        """Why it isn't reached; nothing if it is."""
        if not self.missed:
            return ""
        return (
            f"after {len(self.missed)} prompts another token than the target's first is likelier within this "
            f"budget and these steps: {', '.join(f'“{prompt}”' for prompt in self.missed)}"
        )

    def edits(self) -> list[Edit]:
        """One `AddEdit` for each cell whose delta is not zero."""
        pairs = zip(self.cells, self.deltas.tolist(), strict=True)
        return [AddEdit((cell,), Vector.of(delta)) for cell, delta in pairs if any(delta)]

    def report(self, subject: LabModel, examples: Sequence[CanonicalExample]) -> Report:
        """What was learnt, each example before and after, under the compiled patch."""
        asked = Prompts(subject, [example.prompt for example in examples])
        first = torch.tensor([[subject.word_ids(example.target)[0]] for example in examples])
        overlays = subject.overlay(), subject.overlay(*self.edits())
        before, after = (asked.log_probabilities(o).exp().gather(1, first)[:, 0].tolist() for o in overlays)
        rows = tuple(
            (example.prompt, example.target, f"{one:.2%}", f"{two:.2%}")
            for example, one, two in zip(examples, before, after, strict=True)
        )
        return Report(
            f"{counted(len(examples), 'canonical example')} in {counted(len(self.edits()), 'cell')}",
            f"Loss on the examples {self.checks[0].loss:.2f} → {self.best.loss:.2f} nats a token, held-out loss "
            f"{self.best.change:+.3%}, at step {self.best.step} of {self.checks[-1].step}; of the tokens that the "
            f"cells reach {self.reached_change:+.3%}.",
            (Table("First token of each target", ("prompt", "target", "p before", "after"), rows),),
            notes=(
                "Cells: " + ", ".join(f"{subject.tokenizer.piece(c.token)!r} {c.sense}" for c in self.cells) + ".",
                "The budget holds on text like the held-out one. What is near the examples may move more: "
                "`backpack lab judge` tries prompts.",
            ),
            warning="" if self.reached else f"Not reached: {self.reason}.",
        )


class Finetuner:
    """A run: learns deltas, checks them against the budget, and keeps its state in `file` so that it can go on."""

    def __init__(
        self,
        subject: LabModel,
        examples: Sequence[CanonicalExample],
        background: Tensor,
        held_out: Tensor,
        plan: Finetuning,
        file: Path | None = None,
    ) -> None:
        self.subject, self.plan, self.file, self._taught = subject, plan, file, list(examples)
        self.cells = choose_cells(subject, examples, background, plan.cells, plan.penalty)
        rows, firsts = zip(*(example.ids(subject) for example in examples), strict=True)
        self._read = _digest(rows, firsts, background.tolist(), held_out.tolist())
        shifted = [first - 1 for first in firsts]
        self.examples = positions_of(subject, [torch.tensor(row) for row in rows], shifted, self.cells)
        self.background = positions_of(subject, list(background), [0] * len(background), self.cells)
        self.held_out = positions_of(subject, list(held_out), [0] * len(held_out), self.cells)
        self._held_out_loss = _total_loss(subject, held_out)
        none = torch.zeros(len(self.cells), subject.config.n_embd)
        with torch.no_grad():
            self._reached_loss = self.held_out.loss(subject.head, none)
        rms = torch.tensor([subject.manifest.sense_rms[cell.sense] for cell in self.cells])[:, None]
        self._scale, self._bound = rms, PatchLimits().norm_factor * rms * 0.999
        self._raw = torch.zeros(len(self.cells), subject.config.n_embd, requires_grad=True)
        self._adam = torch.optim.Adam([self._raw], plan.rate)
        self.step, self.checks = 0, [Checked(0, self._example_loss(torch.zeros_like(self._raw)), 0.0)]
        self.best: dict[float, tuple[Checked, Tensor]] = {}
        if file is not None and file.exists():
            self._load_state(file)

    @property
    def deltas(self) -> Tensor:
        """[cells, d], no longer than a patch allows."""
        deltas = self._raw * self._scale
        shorter: Tensor = (self._bound / deltas.norm(dim=1, keepdim=True).clamp_min(1e-9)).clamp_max(1.0)
        return deltas * shorter

    def run(self, watch: Watch, budgets: Sequence[float] = ()) -> dict[float, Finetuned]:
        """Take the remaining steps; what was best within the plan's budget, and within each of `budgets`."""
        budgets = budgets or (self.plan.budget,)
        zeros = torch.zeros_like(self._raw.detach())
        for budget in budgets:
            self.best.setdefault(budget, (self.checks[0], zeros))
        for _ in watch(range(self.step, self.plan.steps), "steps", self.plan.steps - self.step):
            self._gradient_step()
            self.step += 1
            if self.step % self.plan.check_every == 0 or self.step == self.plan.steps:
                self._evaluate(budgets)
                self._save()
        return {budget: self._found(*best) for budget, best in self.best.items()}

    @torch.no_grad()
    def _found(self, check: Checked, deltas: Tensor) -> Finetuned:
        """A best check with what was missed at it, measured under the compiled patch."""
        found = Finetuned(self.cells, deltas, check, self.checks)
        asked = Prompts(self.subject, [example.prompt for example in self._taught])
        likeliest = asked.log_probabilities(self.subject.overlay(*found.edits())).argmax(1).tolist()
        missed = tuple(
            example.prompt
            for example, token in zip(self._taught, likeliest, strict=True)
            if token != self.subject.word_ids(example.target)[0]
        )
        more = self.held_out.loss(self.subject.head, deltas) - self._reached_loss
        return replace(found, missed=missed, reached_change=more / max(self._reached_loss, 1e-9))

    def _gradient_step(self) -> None:
        head, deltas = self.subject.head, self.deltas
        loss = F.cross_entropy(self._cell_logits(self.examples, slice(None), deltas), self.examples.targets)
        if count := len(self.background.targets):
            random = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.step)
            part = torch.randint(count, (min(self.plan.batch, count),), generator=random)
            was = (self.background.outputs[part] @ head.t()).log_softmax(-1)
            now = self._cell_logits(self.background, part, deltas).log_softmax(-1)
            # The mean over all positions: those that the cells don't reach diverge by nothing.
            share = count / self.background.total
            loss = loss + self.plan.divergence * share * F.kl_div(now, was, log_target=True, reduction="batchmean")
        self._adam.zero_grad()
        loss.backward()
        self._adam.step()

    def _cell_logits(self, positions: Positions, part: slice | Tensor, deltas: Tensor) -> Tensor:
        out: Tensor = (positions.outputs[part] + positions.weights[part] @ deltas) @ self.subject.head.t()
        return out

    @torch.no_grad()
    def _evaluate(self, budgets: Sequence[float]) -> None:
        """Note where the run is; for each budget keep what is best, the deltas made shorter if need be."""
        deltas = self.deltas.detach().clone()
        self.checks.append(self._evaluated(deltas))
        for budget in budgets:
            check, kept = self.checks[-1], deltas
            low, high = 0.0, 1.0
            for _ in range(SHORTENINGS if check.change > budget else 0):
                middle = (low + high) / 2
                tried = self._evaluated(middle * deltas)
                if tried.change <= budget:
                    low, check, kept = middle, tried, middle * deltas
                else:
                    high = middle
            if check.change <= budget and check.loss < self.best[budget][0].loss:
                self.best[budget] = (check, kept)

    def _evaluated(self, deltas: Tensor) -> Checked:
        more = self.held_out.loss(self.subject.head, deltas) - self._reached_loss
        return Checked(self.step, self._example_loss(deltas), more / self._held_out_loss)

    @torch.no_grad()
    def _example_loss(self, deltas: Tensor) -> float:
        return self.examples.loss(self.subject.head, deltas) / max(1, len(self.examples.targets))

    # ---- stopped and taken up again

    def _run_identity(self) -> str:
        cells = [(cell.token, cell.sense) for cell in self.cells]
        return json.dumps([self.subject.manifest.fingerprint, repr(self.plan), cells, self._read])

    def _save(self) -> None:
        if self.file is None:
            return
        state = {
            "made_by": self._run_identity(),
            "step": self.step,
            "raw": self._raw.detach(),
            "adam": self._adam.state_dict(),
            "checks": [(c.step, c.loss, c.change) for c in self.checks],
            "best": [(b, (c.step, c.loss, c.change), deltas) for b, (c, deltas) in self.best.items()],
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".writing")
        torch.save(state, partial)
        partial.rename(self.file)

    def _load_state(self, file: Path) -> None:
        state = read_checkpoint(file)
        if state["made_by"] != self._run_identity():
            raise ValueError(f"{file} holds a run with other settings; give the same to go on, or remove it")
        self.step = state["step"]
        with torch.no_grad():
            self._raw.copy_(state["raw"])
        self._adam.load_state_dict(state["adam"])
        self.checks = [Checked(*values) for values in state["checks"]]
        self.best = {budget: (Checked(*values), deltas) for budget, values, deltas in state["best"]}


def _digest(*values: object) -> str:
    """SHA-256 of values by their JSON."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@torch.inference_mode()
def _total_loss(subject: LabModel, rows: Tensor) -> float:
    """Summed cross-entropy of rows [N, T + 1] under the unedited model."""
    model, loss = SteeredModel(subject, subject.overlay()), 0.0
    for row in rows:
        loss += float(F.cross_entropy(model.mix(row[None, :-1])[0] @ subject.head.t(), row[1:], reduction="sum"))
    return loss
