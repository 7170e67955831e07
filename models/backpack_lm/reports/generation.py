"""The page of a generation: for every token that was made, where it came from, exactly.

A logit is the sum of one term for each (position, sense). The page shades the text before a token by what each
position gave it, and shows the terms; what isn't listed is summed up, so that the parts still make the whole.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files

from backpack_lm.reports.page import page
from backpack_lm.visible import visible


@dataclass(frozen=True, slots=True)
class TermRow:
    """What one sense of one position gave a token's logit: weight α, the topics' multiplier, α·m·E[y]·C(x_j)_l."""

    position: int
    sense: int
    weight: float
    multiplier: float
    contribution: float


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One token: its probability, its logit, its terms, the sum of those that aren't among them, and the release's
    bias on it."""

    token: str
    probability: float
    logit: float
    unlisted: float
    terms: tuple[TermRow, ...]
    bias: float = 0.0


@dataclass(frozen=True, slots=True)
class GenerationPage:
    """A prompt's tokens and what was made after them. `note` says which model and release made it."""

    prompt: tuple[str, ...]
    steps: tuple[TokenStep, ...]
    senses: int
    note: str = ""

    def html(self) -> str:
        room = files("backpack_lm.reports")
        style, script = (room.joinpath(f"generation.{kind}").read_text("utf-8") for kind in ("css", "js"))
        # "<" never ends the script, whatever the text holds.
        data = json.dumps(_rounded(asdict(self)), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        body = (
            "<p class=lead>Point at a word that was made, or use the arrow keys. The text before it is shaded by "
            "what each word gave it: <b class=for>for</b> it or <b class=against>against</b> it. Every term is "
            "exact, and they add up to the logit.</p>"
            "<div class=text id=text></div><div class=panels><section id=detail></section>"
            "<section><h2>By position and sense</h2><div class=scroll><canvas id=map></canvas></div>"
            "<p class=hint id=hint></p></section></div>"
        )
        foot = f"<footer>{escape(self.note)}</footer>" if self.note else ""
        text = "".join(self.prompt)
        title = text if len(text) <= 60 else text[:59] + "…"
        return page(f"“{title}” and on", body + foot, style, f"const DATA = {data};\n{script}")


def _rounded(value: object) -> object:
    """As the page shows it: of five digits, and with nothing that hides in a text or turns it around."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value
