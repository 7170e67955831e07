"""Knowledge editing (paper, section 6), made quantitative: does a swap turn a fact, and what else moves?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack_lm.counted import counted
from backpack_lm.experiments.experiment import Headline, Result
from backpack_lm.experiments.fact_lists import FACTS, FRESH, Fact
from backpack_lm.lab.elsewhere import MOST_MOVED
from backpack_lm.lab.lab_model import LabModel, SteeredModel
from backpack_lm.lab.progress import Watch
from backpack_lm.lab.swap import FITTED, STRENGTHS, Swapped, SwappedFact, fit_swap, swap_fact
from backpack_lm.lab.text import held_out, rows
from backpack_lm.overlay import Overlay
from backpack_lm.reports.report import Report, Table

TURNED = 0.8
"""The share of facts that should turn."""
ROW = 512
"""Tokens of a row of held-out text; the context where that is less."""
FIRST, SECOND = " of the first list", " of the second list, on which nothing was chosen,"
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
    """Facts whose words are all single tokens, those that aren't, and how swaps of each strength fare. `reached`
    says of each fact whether its fit to all prompts reached what fits ask for.

    `fresh` is the same of the second list, on which nothing was chosen.
    """

    facts: list[SwappedFact]
    fitted: list[float]
    unknown: list[str]
    strengths: list[Strength]
    reached: list[bool] = field(default_factory=list)
    fresh: FactsResult | None = None

    @property
    def judged(self) -> FactsResult:
        """What the aim is judged on: the second list, if the model holds any of it."""
        return self.fresh if self.fresh is not None and self.fresh.strengths[0].held else self

    def headline(self) -> Headline:
        fitted = self.judged.strengths[-1]
        figures = self._turned_shares()
        if self.fresh is not None and self.judged is self.fresh:
            figures += f"; on a second list, on which nothing was chosen, {self.fresh._turned_shares()}"
        return Headline(
            figures,
            "one example",
            "over 80 % as the lab fits swaps, on the fact's other prompt, of the list on which nothing was "
            "chosen; neighbours' loss within 1 %",
            fitted.turned > TURNED and fitted.cost is not None and fitted.cost.after <= 0.01,
        )

    def _turned_shares(self) -> str:
        plain, chosen, fitted = self.strengths[0], *self.strengths[-2:]

        def told(strength: Strength) -> str:
            cost = f" (loss after the words {strength.cost.after:+.2%})" if strength.cost else ""
            return f"{strength.turned:.0%}{cost}"

        return (
            f"{plain.turned:.0%} of {counted(len(plain.held), 'prompt')} on which it held the fact turn by a plain "
            f"swap; "
            f"{told(fitted)} with the strength fitted on the fact's other prompt, "
            f"{told(chosen)} with one chosen on the other facts"
        )

    def _lead(self, of: str) -> str:
        plain, chosen, fitted = self.strengths[0], *self.strengths[-2:]
        if not plain.held:
            return f"This model holds none of the facts{of}, so there is nothing to turn."
        return (
            f"Of {len(plain.held)} prompts (of {len(plain.prompts)}){of} on which the model held the old fact, "
            f"{plain.turned:.0%} hold the new one after a plain swap, {fitted.turned:.0%} after one whose "
            f"strength was fitted on the fact's other prompt, and {chosen.turned:.0%} after one whose "
            "strength was chosen on the other facts. The old word's share of the two goes from "
            f"{plain.mean('share_before'):.0%} to {plain.mean('share_after'):.0%}, "
            f"{fitted.mean('share_after'):.0%} and {chosen.mean('share_after'):.0%}."
        )

    def _tables(self, of: str) -> tuple[Table, Table]:
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
        reached = self.reached or [True] * len(self.facts)
        rows = tuple(
            (
                f"{fact.word}: {fact.old} → {fact.new}",
                sum(p.held for p in fact.prompts),
                sum(p.held and p.turned for p in fact.prompts),
                f"{fact.mean('share_before'):.1%}",
                f"{fact.mean('share_after'):.1%}",
                f"{fact.mean('moved'):.2%}",
                f"{strength:g}" if there else f"{strength:g}, not reached",
            )
            for fact, strength, there in zip(self.facts, self.fitted, reached, strict=True)
        )
        return (
            Table(f"By strength{of}", columns, tuple(s.row() for s in self.strengths)),
            Table(f"Every fact, plain swap{of}", every, rows, digits=0),
        )

    def _compare_lists(self, fresh: FactsResult) -> Table:
        """Both lists in a row for each strength."""
        heads = ("turned", "else moved", "loss after a word")
        columns = tuple(f"{head}, {which}" for head in heads for which in ("chosen on", "fresh"))
        rows = []
        for pair in zip(self.strengths, fresh.strengths, strict=True):
            costs = (None if s.cost is None else f"{s.cost.after:+.2%}" for s in pair)
            turned, moved = (f"{s.turned:.0%}" for s in pair), (f"{s.mean('moved'):.1%}" for s in pair)
            rows.append((pair[0].name, *turned, *moved, *costs))
        held = tuple(str(len(r.strengths[0].held)) for r in (self, fresh))
        rows.append(("prompts held", *held, None, None, None, None))
        return Table("Both lists", ("strength", *columns), tuple(rows))

    def report(self) -> Report:
        notes = [
            "All senses of the word are swapped. A prompt counts if the model gave the old word more than the new "
            "one before; it is turned if the new one has more after.",
            "Strength 1 is the paper's swap: what the word says of the old one, it says of the new one. What "
            "other words of a prompt say of the old one stays; strength s moves the two logits s times as far, "
            "and the others as little as can be.",
            f"“{OTHER_FACTS}”: each fact with the least strength that turns over {TURNED:.0%} of all other facts' "
            f"prompts. “{OTHER_PROMPT}”: each prompt with the least that gives the new word {FITTED:.0%} of the "
            f"two after the fact's other prompts, as long as no more than {MOST_MOVED:.0%} of the probability "
            "moves elsewhere, as `backpack lab swap-fact --fit` does; if none does, with the one that comes "
            "nearest. No strength is counted on what it was chosen on.",
            "“Else moved” is the total variation distance over all other tokens. Loss is on held-out text with "
            "all swaps of a row at once (of the last, each fitted to all prompts of its fact): everywhere, "
            "where an edited word stands before in the row, and right after one. Text without the words can't "
            "change.",
        ]
        if self.fresh is not None:
            notes.append(
                "What swaps ask for, the strengths that are tried and the bound on what else moves were chosen on "
                "the first list. Nothing was chosen on the second, fresh one; it was written before anything was "
                "measured with it, and none of its facts was changed or left out since."
            )
        unknown = [*self.unknown, *(self.fresh.unknown if self.fresh else ())]
        if unknown:
            notes.append(f"Left out, because a word is several tokens in this model: {', '.join(unknown)}.")
        fresh = self.fresh
        if fresh is None or not fresh.facts:
            return Report("Knowledge editing", self._lead(""), self._tables(""), notes=tuple(notes))
        return Report(
            "Knowledge editing",
            " ".join((self._lead(FIRST), fresh._lead(SECOND))),
            (self._compare_lists(fresh), *self._tables(", first list"), *fresh._tables(", second list")),
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
        return replace(self._measure_facts(subject, FACTS, watch), fresh=self._measure_facts(subject, FRESH, watch))

    def _measure_facts(self, subject: LabModel, facts: Sequence[Fact], watch: Watch) -> FactsResult:
        """One list: every fact with every strength, and with those that are fitted."""
        known = [f for f in facts if len(subject.single_token_words((f.word, f.old, f.new))) == 3]
        by_strength: dict[float, list[SwappedFact]] = {strength: [] for strength in STRENGTHS}
        others: list[Swapped] = []
        fitted: list[SwappedFact] = []
        for fact in watch(known, "facts", len(known)):
            words, prompts = (fact.word, fact.old, fact.new), _naming(subject, fact)
            for strength, found in by_strength.items():
                found.append(swap_fact(subject, *words, prompts, strength=strength))
            for at, prompt in enumerate(prompts):
                strength = fit_swap(subject, *words, prompts[:at] + prompts[at + 1 :]).strength
                others += swap_fact(subject, *words, [prompt], strength=strength).prompts
            fitted.append(fit_swap(subject, *words, prompts))
        named = [(f"{strength:g}", facts_, _prompts(facts_)) for strength, facts_ in by_strength.items()]
        chosen = [by_strength[_on_the_others(by_strength, at)][at] for at in range(len(known))]
        named += [(OTHER_FACTS, chosen, _prompts(chosen)), (OTHER_PROMPT, fitted, others)]
        costs = self._costs(subject, [swaps for _, swaps, _ in named], watch) if known else [None] * len(named)
        strengths = [Strength(name, prompts, cost) for (name, _, prompts), cost in zip(named, costs, strict=True)]
        unknown = [f"{fact.word}: {fact.old} → {fact.new}" for fact in facts if fact not in known]
        kept, there = [fact.strength for fact in fitted], [fact.reached for fact in fitted]
        return FactsResult(by_strength[1.0], kept, unknown, strengths, there)

    @torch.inference_mode()
    def _costs(self, subject: LabModel, swaps: Sequence[list[SwappedFact]], watch: Watch) -> Sequence[Cost | None]:
        if not self.texts:
            return [None] * len(swaps)
        length, each = min(ROW, subject.config.n_positions), self.tokens // len(self.texts)
        text = torch.cat([rows(subject, held_out(t), max(each, length), length) for t in self.texts])
        words = torch.tensor([subject.token(fact.word) for fact in swaps[0]])
        here = torch.isin(text[:, :-1], words)
        parts = torch.ones_like(here), here.cumsum(1) > 0, here
        edits = [[edit for fact in facts for edit in fact.edits(subject)] for facts in swaps]
        before, *after = _losses(subject, [subject.overlay(), *(subject.overlay(*some) for some in edits)], text, watch)

        def share(more: Tensor, part: Tensor) -> float:
            return float(more[part].sum() / before[part].sum()) if part.any() else 0.0

        return [Cost(*(share(losses - before, part) for part in parts)) for losses in after]


def _on_the_others(by_strength: dict[float, list[SwappedFact]], left_out: int) -> float:
    """The least strength that turns over TURNED of the prompts of all facts but one; the greatest if none does."""
    for strength, facts in by_strength.items():
        rest = facts[:left_out] + facts[left_out + 1 :]
        held = [prompt for prompt in _prompts(rest) if prompt.held]
        if not held or sum(prompt.turned for prompt in held) > TURNED * len(held):
            return strength
    return max(by_strength)


def _losses(subject: LabModel, overlays: Sequence[Overlay], text: Tensor, watch: Watch) -> Tensor:
    """Cross-entropy of each token of rows [N, T + 1] under each overlay: [overlays, N, T]. The sense weights are the
    same under all of them, so the trunk reads a row once."""
    found = torch.empty(len(overlays), len(text), text.shape[1] - 1, dtype=torch.float64)
    for at, row in enumerate(watch(text, "held-out text", len(text))):
        ids = row[None, :-1]
        alpha = subject.model.sense_weights(ids)
        for number, overlay in enumerate(overlays):
            logits = SteeredModel(subject, overlay).mix_by(alpha, ids)[0] @ subject.head.t()
            found[number, at] = F.cross_entropy(logits, row[1:], reduction="none").double()
    return found


def _prompts(facts: Sequence[SwappedFact]) -> list[Swapped]:
    return [prompt for fact in facts for prompt in fact.prompts]


def _naming(subject: LabModel, fact: Fact) -> list[str]:
    """A word at the very start of a prompt is another token, without its space; such prompts get a beginning."""
    token = subject.token(fact.word)
    return [p if token in subject.ids(p) else f"They say that {p}" for p in fact.prompts]
