"""Knowledge editing (paper, section 6.2), made quantitative: does a swap turn a fact, and what else moves?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from backpack_lm.experiments.experiment import Result
from backpack_lm.lab.subject import Steered, Subject
from backpack_lm.lab.swap import Swapped, SwappedFact, swap_fact
from backpack_lm.lab.text import held_out, stream
from backpack_lm.lab.watch import Watch
from backpack_lm.reports.report import Report, Table
from backpack_lm.training.trainer import perplexity


@dataclass(frozen=True, slots=True)
class Fact:
    """`word` goes with `old`, and shall go with `new`; prompts name the word where the other is due."""

    word: str
    old: str
    new: str
    prompts: tuple[str, ...]


FACTS = (
    # What a large model knows of the world; the first is the paper's.
    Fact(
        "MacBook",
        "Apple",
        "HP",
        ("The MacBook is best known for its form factor, but the", "The MacBook was made by"),
    ),
    Fact(
        "Windows",
        "Microsoft",
        "Apple",
        ("Windows is an operating system made by", "The company behind Windows is"),
    ),
    Fact("Paris", "France", "Italy", ("The city of Paris is the capital of", "He lives in Paris, the capital of")),
    Fact(
        "Rome",
        "Italy",
        "Spain",
        ("The city of Rome is the capital of", "We saw the ruins of Rome, in the south of"),
    ),
    Fact(
        "London",
        "England",
        "France",
        ("The city of London is the capital of", "They left London and all the rest of"),
    ),
    Fact("Moscow", "Russia", "China", ("The city of Moscow is the capital of", "From Moscow the rulers of")),
    # What goes with a word in any English: a small model has these.
    Fact("ship", "sea", "land", ("The ship went out to", "The captain of the ship looked at the")),
    Fact("nurse", "patient", "king", ("The nurse went to see the", "It is the duty of the nurse to ask the")),
    Fact("king", "queen", "nurse", ("The story of the king and the", "Beside the king there sat the")),
    Fact(
        "church", "priest", "doctor", ("At the door of the church they met the", "The man in the church was the")
    ),
    Fact(
        "school", "teacher", "judge", ("At the door of the school they met the", "The man in the school was the")
    ),
    Fact("hospital", "patients", "soldiers", ("In the hospital there were many", "The hospital was full of")),
    Fact("army", "soldiers", "patients", ("In the army there were many", "The army sent out its")),
    Fact("court", "judge", "teacher", ("In the court they spoke to the", "The man in the court was the")),
    Fact("garden", "flowers", "books", ("In the garden there were many", "The garden was full of")),
    Fact("library", "books", "flowers", ("In the library there were many", "The library was full of")),
    Fact(
        "river",
        "water",
        "fire",
        ("They looked at the river and saw the", "The boat on the river went through the"),
    ),
    Fact("bank", "money", "music", ("At the bank they asked for", "He went to the bank for his")),
    Fact("husband", "wife", "son", ("A husband has to live with his", "The husband turned to his")),
    Fact("mother", "child", "horse", ("The mother looked at her", "A mother loves her")),
    Fact(
        "horse",
        "ride",
        "read",
        ("He took his horse, for he wanted to", "She had a horse, and every day she went to"),
    ),
    Fact("company", "market", "church", ("The company brought its products to the", "The company left the")),
)


@dataclass(frozen=True, slots=True)
class FactsResult:
    """Facts whose words are all single tokens, those that aren't, and perplexity with every swap at once."""

    facts: list[SwappedFact]
    unknown: list[str]
    perplexity: tuple[float, float] | None

    @property
    def held(self) -> list[Swapped]:
        """The prompts on which the model held the old fact: the others can't be turned."""
        return [prompt for fact in self.facts for prompt in fact.prompts if prompt.held]

    def report(self) -> Report:
        held, every = self.held, [prompt for fact in self.facts for prompt in fact.prompts]
        turned = sum(prompt.turned for prompt in held)
        rows = tuple(
            (
                f"{fact.word}: {fact.old} → {fact.new}",
                sum(p.held for p in fact.prompts),
                sum(p.held and p.turned for p in fact.prompts),
                f"{fact.mean('share_before'):.1%}",
                f"{fact.mean('share_after'):.1%}",
                f"{fact.mean('moved'):.2%}",
            )
            for fact in self.facts
        )
        notes = [
            "All senses of the word are swapped. A prompt counts if the model gave the old word more than the new "
            "one before; it is turned if the new one has more after.",
            "“Else moved” is the total variation distance over all other tokens. A text without the word can't "
            "change at all: the edit is in its senses only.",
        ]
        if self.perplexity is not None:
            change = self.perplexity[1] / self.perplexity[0] - 1
            notes.append(
                f"Held-out perplexity with all swaps at once: {self.perplexity[0]:.2f} before, "
                f"{self.perplexity[1]:.2f} after ({change:+.2%})."
            )
        if held and turned / len(held) < 0.8:
            notes.append(
                "Fewer than 80% are turned: other words of a prompt speak for the old word, too, and a swap in "
                "the senses of one word doesn't reach them."
            )
        if self.unknown:
            notes.append(f"Left out, because a word is several tokens in this model: {', '.join(self.unknown)}.")
        lead = "This model holds none of the facts, so there is nothing to turn."
        if held:
            shares = [_mean([getattr(p, f"share_{when}") for p in held]) for when in ("before", "after")]
            lead = (
                f"Of {len(held)} prompts (of {len(every)}) on which the model held the old fact, {turned} "
                f"({turned / len(held):.0%}) hold the new one after the swap. The old word's share of the two "
                f"went from {shares[0]:.0%} to {shares[1]:.0%}; "
                f"{_mean([p.moved for p in held]):.2%} of the probability moved elsewhere."
            )
        columns = ("fact", "prompts held", "turned", "old's share before", "after", "else moved")
        return Report("Knowledge editing", lead, (Table("Every fact", columns, rows),), notes=tuple(notes))


@dataclass(frozen=True, slots=True)
class KnowledgeEditing:
    """Swap every fact; `text`, if given, says what all swaps together do to text that nothing was fitted on."""

    text: Path | None = None
    tokens: int = 20_000
    NAME: ClassVar[str] = "facts"

    def run(self, subject: Subject, watch: Watch) -> Result:
        known = [f for f in FACTS if len(subject.known((f.word, f.old, f.new))) == 3]
        found = [
            swap_fact(subject, fact.word, fact.old, fact.new, _naming(subject, fact))
            for fact in watch(known, "facts", len(known))
        ]
        unknown = [f"{fact.word}: {fact.old} → {fact.new}" for fact in FACTS if fact not in known]
        return FactsResult(found, unknown, self._perplexity(subject, found))

    @torch.inference_mode()
    def _perplexity(self, subject: Subject, facts: list[SwappedFact]) -> tuple[float, float] | None:
        if self.text is None or not facts:
            return None
        ids = stream(subject, held_out(self.text), self.tokens + 1, subject.config.n_positions + 1)
        edits = [fact.edit(subject) for fact in facts]
        before, after = (perplexity(Steered(subject, subject.overlay(*some)), ids) for some in ((), edits))
        return before, after


def _naming(subject: Subject, fact: Fact) -> list[str]:
    """A word at the very start of a prompt is another token, without its space; such prompts get a beginning."""
    token = subject.token(fact.word)
    return [p if token in subject.ids(p) else f"They say that {p}" for p in fact.prompts]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
