"""The page of a word: what each of its senses predicts, speaks against, and is near to (the paper's table 2)."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from importlib.resources import files

from backpack_lm.reports.page import page

Scored = tuple[str, float]


@dataclass(frozen=True, slots=True)
class SensePage:
    """One sense: tokens whose logit it raises and lowers most, and words whose same sense is near (cosine)."""

    norm: float
    edited: bool
    raises: tuple[Scored, ...]
    lowers: tuple[Scored, ...]
    neighbours: tuple[Scored, ...]


@dataclass(frozen=True, slots=True)
class WordPage:
    """All senses of a word. `note` says which model and release it was read from."""

    word: str
    senses: tuple[SensePage, ...]
    note: str = ""

    def html(self) -> str:
        longest = max(sense.norm for sense in self.senses) or 1.0
        cards = "".join(_card(number, sense, longest) for number, sense in enumerate(self.senses))
        lead = (
            "<p class=lead>Each sense is one vector, the same wherever the word is. It <b class=for>raises</b> "
            "the words it predicts and <b class=against>lowers</b> others; <b>near</b> are words whose same sense "
            "points the same way. Numbers are added to a logit for each unit of weight.</p>"
        )
        style = files("backpack_lm.reports").joinpath("word.css").read_text("utf-8")
        foot = f"<footer>{escape(self.note)}</footer>" if self.note else ""
        return page(f"The senses of “{self.word}”", f"{lead}<div class=senses>{cards}</div>{foot}", style)


def _card(number: int, sense: SensePage, longest: float) -> str:
    largest = max((abs(score) for _, score in (*sense.raises, *sense.lowers)), default=1.0) or 1.0
    rows = [
        ("raises", "".join(_chip(word, score, largest, "--shade") for word, score in sense.raises)),
        ("lowers", "".join(_chip(word, score, largest, "--shade-against") for word, score in sense.lowers)),
    ]
    if sense.neighbours:
        near = "".join(
            f'<span class="chip near" title="cosine {score:.3f}">{escape(word)}</span> '
            for word, score in sense.neighbours
        )
        rows.append(("near", near))
    edited = "<span class=edited>edited</span>" if sense.edited else ""
    body = "".join(f"<dt>{name}</dt><dd>{chips}</dd>" for name, chips in rows)
    return (
        f"<section class=sense><h2>Sense {number} <small>length {sense.norm:.2f}</small> {edited}</h2>"
        f'<div class=norm><i style="width:{100 * sense.norm / longest:.1f}%"></i></div><dl>{body}</dl></section>'
    )


def _chip(word: str, score: float, largest: float, colour: str) -> str:
    depth = 0.08 + 0.5 * abs(score) / largest
    return (
        f'<span class=chip style="background:rgba(var({colour}),{depth:.2f})" title="{score:+.3f}">'
        f"{escape(word)}</span> "
    )
