"""Ordinary text beside the examples: what a patch should leave as it was, and what it is judged on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from backpack_lm.counted import counted
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.ordinary_text import plain
from backpack_lm.training.data import Source

HELD_OUT = 0.2  # of a plain file: its end


def held_out(path: Path) -> Iterator[str]:
    """The records of a corpus that training sets aside, or the last fifth of a plain file."""
    return _split_text(path, True)


def background(path: Path) -> Iterator[str]:
    """The records of a corpus that may be trained on, or all but the last fifth of a plain file."""
    return _split_text(path, False)


def _split_text(path: Path, wanted: bool) -> Iterator[str]:
    if ".jsonl" in path.suffixes:
        yield from (text for text, kept in Source(path).records() if kept is wanted)
        return
    text = plain(path)
    end = int((1 - HELD_OUT) * len(text))
    cut = text.rfind("\n", 0, end) + 1 or text.rfind(" ", 0, end) + 1 or end  # at a line, at a word
    yield text[cut:] if wanted else text[:cut]


def stream(subject: LabModel, records: Iterable[str], limit: int, least: int, what: str = "the text") -> Tensor:
    """Ids [N] of records, each after an end-of-text token, `limit` of them if there are as many.

    Raises ValueError, saying of `what`, if there are fewer than `least`.
    """
    ids: list[int] = []
    for text in records:
        if subject.config.eos_token_id is not None:
            ids.append(subject.config.eos_token_id)
        # No token is longer than some characters: a book isn't tokenised for its first page.
        ids += subject.tokenizer.encode(text[: 16 * (limit - len(ids)) + 64])
        if len(ids) >= limit:
            break
    if len(ids) < least:
        raise ValueError(f"{what} has {counted(len(ids), 'token')}; at least {least} are needed")
    return torch.tensor(ids[:limit])


def rows(subject: LabModel, records: Iterable[str], tokens: int, length: int = 128, what: str = "the text") -> Tensor:
    """Rows [N, length + 1] of text: inputs and, one further, their targets."""
    length = min(length, subject.config.n_positions)
    ids = stream(subject, records, tokens + 1, length + 1, what)
    return ids[: (len(ids) - 1) // length * length + 1].unfold(0, length + 1, length)


def both_parts(subject: LabModel, path: Path, tokens: int) -> tuple[Tensor, Tensor]:
    """Rows of a file's background and of its held-out part. Raises ValueError naming the one that is too short."""
    near = rows(subject, background(path), tokens, what=f"the part of {path} to stay close on")
    return near, rows(subject, held_out(path), tokens, what=f"the held-out part of {path}")
