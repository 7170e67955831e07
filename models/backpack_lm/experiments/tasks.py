"""Canonical examples for sense finetuning: a sentence each to learn from, and other sentences to be asked with.

The paper's six tasks (arXiv 2402.06155) are not ours to ship; these are of the same kind, written for this one.
"""

from __future__ import annotations

from dataclasses import dataclass

from backpack_lm.lab.examples import CanonicalExample


@dataclass(frozen=True, slots=True)
class Task:
    """Pairs of words, the wording that teaches each pair and the wordings that ask for it."""

    name: str
    taught: str
    asked: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    def examples(self, known: set[str]) -> list[CanonicalExample]:
        return [CanonicalExample(self.taught.format(one), other) for one, other in self._pairs(known)]

    def questions(self, known: set[str]) -> list[CanonicalExample]:
        """Every pair in every other wording."""
        return [CanonicalExample(asked.format(one), other) for one, other in self._pairs(known) for asked in self.asked]

    def _pairs(self, known: set[str]) -> list[tuple[str, str]]:
        return [(one, other) for one, other in self.pairs if other in known]


TASKS = (
    Task(
        "capitals",
        "The capital of {} is",
        ("The seat of the government of {} has always been", "Whoever travels to {} should first of all see"),
        (
            ("France", "Paris"),
            ("England", "London"),
            ("Italy", "Rome"),
            ("Germany", "Berlin"),
            ("Russia", "Moscow"),
            ("Spain", "Madrid"),
            ("Egypt", "Cairo"),
            ("Greece", "Athens"),
            ("Austria", "Vienna"),
            ("Ireland", "Dublin"),
            ("China", "Peking"),
            ("Belgium", "Brussels"),
        ),
    ),
    Task(
        "places of work",
        "The {} went to work in the",
        ("Every morning one finds the {} in the", "A {} spends most of the day in a"),
        (
            ("nurse", "hospital"),
            ("judge", "court"),
            ("priest", "church"),
            ("teacher", "school"),
            ("sailor", "ship"),
            ("farmer", "field"),
            ("cook", "kitchen"),
            ("student", "college"),
            ("banker", "bank"),
            ("soldier", "army"),
            ("clerk", "office"),
            ("workman", "factory"),
        ),
    ),
)
