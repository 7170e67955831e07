"""A report: a lead, tables, figures and notes, as Markdown or as a page of HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from backpack_lm.reports.page import page

_MARKUP = re.compile(r"([\\`*_~<&\[|])")

_NUMBER = re.compile(r"[-+−]?[\d,]+(\.\d+)? ?%?|–")
"""What stands right in its column, under a heading that does, too: a figure, or none."""

Entry = str | int | float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns. Floats are shown to `digits` places; None is shown as a dash."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    digits: int = 3

    def shown(self) -> list[list[str]]:
        return [[_cell_text(entry, self.digits) for entry in row] for row in self.rows]

    def markdown(self) -> str:
        return f"**{self.title}**\n\n{self.rows_markdown()}"

    def rows_markdown(self) -> str:
        """Without the title."""
        head, *body = ("| " + " | ".join(map(_literal, row)) + " |" for row in (self.columns, *self.shown()))
        return "\n".join([head, "|" + "---|" * len(self.columns), *body])

    def html(self) -> str:
        shown = self.shown()
        numbers = [all(map(_NUMBER.fullmatch, column)) for column in zip(*shown, strict=True)]
        kinds = [" class=number" * number for number in numbers] or [""] * len(self.columns)

        def line(cell: str, texts: Sequence[str]) -> str:
            pairs = zip(kinds, texts, strict=True)
            return f"<tr>{''.join(f'<{cell}{kind}>{escape(text)}</{cell}>' for kind, text in pairs)}</tr>"

        return (
            f"<h2>{escape(self.title)}</h2><div class=scroll><table><thead>{line('th', self.columns)}</thead>"
            f"<tbody>{''.join(line('td', row) for row in shown)}</tbody></table></div>"
        )


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture, as SVG (`plots.py`)."""

    title: str
    svg: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, for people. `lead` says it in a sentence or two; `notes` say how, and what limits it.

    `warning` stands above all: what was asked for and not reached, or can't be told.
    """

    title: str
    lead: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    warning: str = ""
    made_by: str = field(default="", compare=False)

    def markdown(self) -> str:
        parts = [f"# {_literal(self.title)}", *([f"**{_literal(self.warning)}**"] if self.warning else [])]
        parts += [self.lead, *(table.markdown() for table in self.tables)]
        parts += ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        parts += [f"Made by {_code(self.made_by)}."] if self.made_by else []
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        figures = [f"<h2>{escape(f.title)}</h2><figure>{_inline(f.svg)}</figure>" for f in self.figures]
        notes = f"<ul class=notes>{''.join(f'<li>{escape(note)}</li>' for note in self.notes)}</ul>"
        body = [f"<p class=lead><strong>{escape(self.warning)}</strong></p>"] if self.warning else []
        body += [f"<p class=lead>{escape(self.lead)}</p>", *figures, *(t.html() for t in self.tables)]
        body += [notes] if self.notes else []
        body += [f"<footer>Made by <code>{escape(self.made_by)}</code></footer>"] if self.made_by else []
        return page(self.title, "".join(body))


def best(values: Sequence[float]) -> int:
    """Index of the largest value."""
    return max(range(len(values)), key=values.__getitem__)


def _inline(svg: str) -> str:
    """An SVG file without its XML head, as HTML takes it."""
    return svg[svg.index("<svg") :]


def _literal(text: str) -> str:
    """Text that Markdown shows as it is, in one line: a prompt or a token may hold anything."""
    return _MARKUP.sub(r"\\\1", text.replace("\n", "↵"))


def _code(text: str) -> str:
    """Text as code of one line, between more backticks than it has in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{text.replace(chr(10), '↵')}{space}{fence}"


def _cell_text(entry: Entry, digits: int) -> str:
    if entry is None:
        return "–"
    if isinstance(entry, float):
        return f"{entry:.{digits}f}"
    return str(entry)
