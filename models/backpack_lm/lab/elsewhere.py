"""What an edit moves beside what it aims at, and how much of that is allowed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

MOST_MOVED = 0.25
"""How much of the probability a fit may move among other tokens, after any of its prompts and on the average after
the NEUTRAL ones, unless told otherwise."""
NEUTRAL = ("The {}", "They saw a {}", "It was the {} of", "All about the {} and the")
"""Prompts about a word, at it and a little after it, where no fit aims at anything. What is wanted late in a
sentence may be bought by changing what comes right after the word, wherever it stands."""


def neutral(word: str) -> list[str]:
    return [template.format(word) for template in NEUTRAL]


def moved_elsewhere(before: Tensor, after: Tensor, aimed: Sequence[int] = ()) -> Tensor:
    """Total variation distance [P] of two distributions [P, tokens] over all tokens but those that are aimed at, if
    any: half of the sum of what each gained or lost."""
    others = (after - before).abs()
    others[:, list(aimed)] = 0
    return others.sum(1) / 2


def check_bound(most_moved: float) -> float:
    """Raises ValueError for what is no share of the probability."""
    if not 0 <= most_moved <= 1:
        raise ValueError(f"{most_moved:g} of the probability; write a share from 0 to 1, and 1 bounds nothing")
    return most_moved
