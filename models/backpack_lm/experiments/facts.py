"""Knowledge editing (paper, section 6), made quantitative: does a swap turn a fact, and what else moves?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack_lm.counted import counted
from backpack_lm.experiments.experiment import Headline, Result
from backpack_lm.experiments.fact_lists import FACTS, Fact
from backpack_lm.lab.lab_model import LabModel, SteeredModel
from backpack_lm.lab.progress import Watch
from backpack_lm.lab.swap import FITTED, STRENGTHS, Swapped, SwappedFact, fit_strength, swap_fact
from backpack_lm.lab.text import held_out, rows
from backpack_lm.overlay import Overlay
from backpack_lm.reports.report import Report, Table

TURNED = 0.8
"""The share of facts that should turn."""
OTHER_FACTS, OTHER_PROMPT = "chosen on the other facts", "fitted on the other prompt"


@dataclass(frozen=True, slots=True)
class Cost:
    """What all swaps of one strength at once do to loss on text that nothing was fitted on, as shares of it: on
    all of it, where an edited word stands before in the row, and on the token right after an edited word."""

    everywhere: float
    after: float
    next: float


@dataclass(frozen=True, slots=True)
class Strength:
    """Every known fact swapped with one strength, or each with one that was chosen on other facts or prompts."""

    name: str
    prompts: list[Swapped]
    cost: Cost | None

    @property
    def held(self) -> list[Swapped]:
        """The prompts on which the model held the old fact: the others can't be turned."""
        return [prompt for prompt in self.prompts if prompt.held]

    @property
    def turned(self) -> float:
        """Share of them that hold the new fact after."""
        return self.mean("turned")

    def mean(self, name: str) -> float:
        return math.fsum(getattr(prompt, name) for prompt in self.held) / max(1, len(self.held))

    def row(self) -> tuple[str | float | None, ...]:
        cost = self.cost
        shown = (cost.everywhere, cost.after, cost.next) if cost else (None, None, None)
        return (
            self.name,
            f"{self.turned:.0%}",
            f"{self.mean('share_before'):.0%}",
            f"{self.mean('share_after'):.0%}",
            f"{self.mean('moved'):.1%}",
            *(None if share is None else f"{share:+.2%}" for share in shown),
        )


@dataclass(frozen=True, slots=True)
class FactsResult:
    """Facts whose words are all single tokens, those that aren't, and how swaps of each strength fare."""

    facts: list[SwappedFact]
    fitted: list[float]
    unknown: list[str]
    strengths: list[Strength]

    def headline(self) -> Headline:
        plain, chosen, fitted = self.strengths[0], *self.strengths[-2:]

        def told(strength: Strength) -> str:
            cost = f" (loss after the words {strength.cost.after:+.2%})" if strength.cost else ""
            return f"{strength.turned:.0%}{cost}"

        return Headline(
            f"{plain.turned:.0%} of {counted(len(plain.held), 'prompt')} on which it held the fact turn by a "
            "plain swap; "
            f"{told(fitted)} with the strength fitted on the fact's other prompt, "
            f"{told(chosen)} with one chosen on the other facts",
            "one example",
            "over 80 % as the lab fits swaps, on the fact's other prompt; neighbours' loss within 1 %",
            fitted.turned > TURNED and fitted.cost is not None and fitted.cost.after <= 0.01,
        )

    def report(self) -> Report:
        plain, chosen, fitted = self.strengths[0], *self.strengths[-2:]
        rows = tuple(
            (
                f"{fact.word}: {fact.old} → {fact.new}",
                sum(p.held for p in fact.prompts),
                sum(p.held and p.turned for p in fact.prompts),
                f"{fact.mean('share_before'):.1%}",
                f"{fact.mean('share_after'):.1%}",
                f"{fact.mean('moved'):.2%}",
                strength,
            )
            for fact, strength in zip(self.facts, self.fitted, strict=True)
        )
        notes = [
            "All senses of the word are swapped. A prompt counts if the model gave the old word more than the new "
            "one before; it is turned if the new one has more after.",
            "Strength 1 is the paper's swap: what the word says of the old one, it says of the new one. What "
            "other words of a prompt say of the old one stays; strength s moves the two logits s times as far, "
            "and the others as little as can be.",
            f"“{OTHER_FACTS}”: each fact with the least strength that turns over {TURNED:.0%} of all other facts' "
            f"prompts. “{OTHER_PROMPT}”: each prompt with the least that gives the new word {FITTED:.0%} of the "
            "two after the fact's other prompts. No strength is counted on what it was chosen on.",
            "“Else moved” is the total variation distance over all other tokens. Loss is on held-out text with "
            "all swaps of a row at once (of the last, each fitted to all prompts of its fact): everywhere, "
            "where an edited word stands before in the row, and right after one. Text without the words can't "
            "change.",
        ]
        if self.unknown:
            notes.append(f"Left out, because a word is several tokens in this model: {', '.join(self.unknown)}.")
        lead = "This model holds none of the facts, so there is nothing to turn."
        if plain.held:
            lead = (
                f"Of {counted(len(plain.held), 'prompt')} (of {len(plain.prompts)}) on which the model held the "
                "old fact, "
                f"{plain.turned:.0%} hold the new one after a plain swap, {fitted.turned:.0%} after one whose "
                f"strength was fitted on the fact's other prompt, and {chosen.turned:.0%} after one whose "
                "strength was chosen on the other facts. The old word's share of the two goes from "
                f"{plain.mean('share_before'):.0%} to {plain.mean('share_after'):.0%}, "
                f"{fitted.mean('share_after'):.0%} and {chosen.mean('share_after'):.0%}."
            )
        columns = (
            "strength",
            "turned",
            "old's share before",
            "after",
            "else moved",
            "loss",
            "after a word",
            "right after",
        )
        every = ("fact", "prompts held", "turned", "old's share before", "after", "else moved", "fitted to all")
        return Report(
            "Knowledge editing",
            lead,
            (
                Table("By strength", columns, tuple(s.row() for s in self.strengths)),
                Table("Every fact, plain swap", every, rows, digits=0),
            ),
            notes=tuple(notes),
        )


@dataclass(frozen=True, slots=True)
class KnowledgeEditing:
    """Swap every fact; `texts` say what all swaps together do to text that nothing was fitted on, `tokens` of
    all."""

    texts: tuple[Path, ...] = ()
    tokens: int = 20_000
    NAME: ClassVar[str] = "facts"

    def run(self, subject: LabModel, watch: Watch) -> Result:
        known = [f for f in FACTS if len(subject.known((f.word, f.old, f.new))) == 3]
        by_strength: dict[float, list[SwappedFact]] = {strength: [] for strength in STRENGTHS}
        others: list[Swapped] = []
        fitted: list[SwappedFact] = []
        for fact in watch(known, "facts", len(known)):
            words, prompts = (fact.word, fact.old, fact.new), _naming(subject, fact)
            for strength, found in by_strength.items():
                found.append(swap_fact(subject, *words, prompts, strength=strength))
            for at, prompt in enumerate(prompts):
                strength = fit_strength(subject, *words, prompts[:at] + prompts[at + 1 :])
                others += swap_fact(subject, *words, [prompt], strength=strength).prompts
            fitted.append(swap_fact(subject, *words, prompts, strength=fit_strength(subject, *words, prompts)))
        named = [(f"{strength:g}", facts, _prompts(facts)) for strength, facts in by_strength.items()]
        chosen = [by_strength[_on_the_others(by_strength, at)][at] for at in range(len(known))]
        named += [(OTHER_FACTS, chosen, _prompts(chosen)), (OTHER_PROMPT, fitted, others)]
        costs = self._costs(subject, [facts for _, facts, _ in named], watch) if known else [None] * len(named)
        strengths = [Strength(name, prompts, cost) for (name, _, prompts), cost in zip(named, costs, strict=True)]
        unknown = [f"{fact.word}: {fact.old} → {fact.new}" for fact in FACTS if fact not in known]
        return FactsResult(by_strength[1.0], [fact.strength for fact in fitted], unknown, strengths)

    @torch.inference_mode()
    def _costs(self, subject: LabModel, swaps: Sequence[list[SwappedFact]], watch: Watch) -> Sequence[Cost | None]:
        if not self.texts:
            return [None] * len(swaps)
        length, each = subject.config.n_positions, self.tokens // len(self.texts)
        text = torch.cat([rows(subject, held_out(t), max(each, length), length) for t in self.texts])
        words = torch.tensor([subject.token(fact.word) for fact in swaps[0]])
        here = torch.isin(text[:, :-1], words)
        parts = torch.ones_like(here), here.cumsum(1) > 0, here
        before = _losses(subject, subject.overlay(), text)
        costs = []
        for facts in watch(swaps, "held-out text", len(swaps)):
            overlay = subject.overlay(*(edit for fact in facts for edit in fact.edits(subject)))
            more = _losses(subject, overlay, text) - before
            costs.append(Cost(*(float(more[part].sum() / before[part].sum()) if part.any() else 0.0 for part in parts)))
        return costs


def _on_the_others(by_strength: dict[float, list[SwappedFact]], left_out: int) -> float:
    """The least strength that turns over TURNED of the prompts of all facts but one; the greatest if none does."""
    for strength, facts in by_strength.items():
        rest = facts[:left_out] + facts[left_out + 1 :]
        held = [prompt for prompt in _prompts(rest) if prompt.held]
        if not held or sum(prompt.turned for prompt in held) > TURNED * len(held):
            return strength
    return max(by_strength)


def _losses(subject: LabModel, overlay: Overlay, text: Tensor) -> Tensor:
    """Cross-entropy of each token of rows [N, T + 1]: [N, T]."""
    model, found = SteeredModel(subject, overlay), []
    for row in text:
        logits = model.mix(row[None, :-1])[0] @ subject.head.t()
        found.append(F.cross_entropy(logits, row[1:], reduction="none").double())
    return torch.stack(found)


def _prompts(facts: Sequence[SwappedFact]) -> list[Swapped]:
    return [prompt for fact in facts for prompt in fact.prompts]


def _naming(subject: LabModel, fact: Fact) -> list[str]:
    """A word at the very start of a prompt is another token, without its space; such prompts get a beginning."""
    token = subject.token(fact.word)
    return [p if token in subject.ids(p) else f"They say that {p}" for p in fact.prompts]
