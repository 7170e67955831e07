"""`backpack map` and `backpack uses`: one sense of many words, and where a word is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from backpack_serving.cli.client import (
    AsTenant,
    CalledChannel,
    Key,
    ReleaseNumber,
    as_caller,
    bare_text,
    err,
    footnote,
    out,
)
from backpack_serving.client import MapAxis, Token, WordUse

NAMED, SAID = 6, 3
"""Tokens that say what an axis speaks for at each end; senses that are shown with each use."""


def map_sense(
    sense: Annotated[int, typer.Argument(help="Number of the sense.", min=0)],
    words: Annotated[list[str], typer.Argument(help="3 to 256 words, one token each.")],
    toward: Annotated[
        list[str] | None, typer.Option(help="Word that x lies towards: what the sense adds to its logit; repeatable.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Word to set those against; repeatable. All words if none.")
    ] = None,
    tenant: AsTenant = "",
    key: Key = "",
    channel: CalledChannel = "live",
    release: ReleaseNumber = None,
) -> None:
    """Show where one sense of many words lies: along the two directions in which they differ most.

    `backpack map 7 nurse doctor teacher engineer`, or by what it adds to a word:
    `backpack map 7 nurse doctor teacher engineer --toward she --against he`
    """
    with as_caller(tenant, key) as client:
        answer = client.map_sense(sense, words, toward or (), against or (), NAMED, channel=channel, release=release)
    shown = Table("word", "x", "y", "norm", box=None)
    for column in shown.columns[1:]:
        column.justify = "right"
    for each in sorted(answer.words, key=lambda word: -word.x):
        mark = " [yellow]edited[/]" if each.edited else ""
        shown.add_row(Text(repr(each.token.text)), f"{each.x:+.2f}", f"{each.y:+.2f}", f"{each.norm:.2f}{mark}")
    out.print(shown)
    for name, axis in (("x", answer.x), ("y", answer.y)):
        out.print(_axis_line(name, axis))
    footnote(answer.served, f"sense {sense} of {len(answer.words)} words")


def uses(
    word: Annotated[str, typer.Argument(help="One word; it is looked up with a leading space.")],
    limit: Annotated[int, typer.Option(help="Number of uses to show.", min=1, max=32)] = 8,
    tenant: AsTenant = "",
    key: Key = "",
    channel: CalledChannel = "live",
    release: ReleaseNumber = None,
) -> None:
    """Show where a word is used in the model's held-out text, and which senses spoke there, most for which word.

    Needs the role author, too. `backpack uses bank --limit 4`
    """
    with as_caller(tenant, key) as client:
        answer = client.uses(word, limit, channel=channel, release=release)
    for use in answer.uses:
        before, after = ("".join(token.text for token in side) for side in (use.before, use.after))
        out.print(Text.assemble("…" if use.before else "", before, (answer.token.text, "bold"), after, "…"))
        out.print(Text(f"   {_said(use)}", "dim"))
    if not answer.uses:
        out.print(f"{answer.token.text!r} isn't used in the model's held-out text of {answer.text_tokens:,} tokens")
    err.print(f"[dim]{len(answer.uses)} of {answer.occurrences} uses in {answer.text_tokens:,} tokens[/]")
    footnote(answer.served)


def _axis_line(name: str, axis: MapAxis) -> Text:
    ends = " · less: ".join(_spelled_out(end) for end in (axis.positive, axis.negative))
    return Text(f"{name}: {100 * axis.share:.0f} % of the variance · more: {ends}", "dim")


def _spelled_out(scored: Sequence[tuple[Token, float]]) -> str:
    return " ".join(bare_text(token) for token, _ in scored)


def _said(use: WordUse) -> str:
    """The senses that said most, by size."""
    order = sorted(range(len(use.senses)), key=lambda number: -abs(use.senses[number].contribution))
    said = ((number, use.senses[number]) for number in order[:SAID])
    return " · ".join(
        f"sense {number} {one.contribution:+.1f}, most for {use.after[one.strongest].text!r}" for number, one in said
    )
