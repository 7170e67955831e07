"""`backpack compare`: one text under many releases."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import typer
from backpack_lm.counted import counted
from rich.columns import Columns
from rich.table import Table
from rich.text import Text

from backpack_serving.cli.client import AsTenant, Key, as_caller, err, out, percent
from backpack_serving.cli.find import target_words
from backpack_serving.client import Client, InvalidRequest, Prediction, Score, Served, Token
from backpack_serving.references import CANARY, NAME


def compare(
    text: Annotated[str, typer.Argument(help="Text to score, and whose next token to predict.")],
    release: Annotated[
        list[str] | None,
        typer.Option(
            help="A number (3), numbers (1-8), a channel (live), or unpatched; repeatable, up to 256. "
            "If none: unpatched and live."
        ),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="Word whose probability to show; repeatable.")] = None,
    top: Annotated[int, typer.Option(help="Number of likeliest next tokens to show.", min=1, max=100)] = 3,
    score: Annotated[
        bool, typer.Option("--score", help="Only score the text, and show the token that each release changes most.")
    ] = False,
    tenant: AsTenant = "",
    key: Key = "",
) -> None:
    """Compare a text and its next token under up to 256 releases.

    What the live release changes: `backpack compare "How to take care of a horse:" --target ship`

    All releases up to 8 beside the model as it is: `backpack compare TEXT --release unpatched --release 1-8`
    """
    choices = list(_choices(release or ["unpatched", "live"]))
    with as_caller(tenant, key) as client:
        if score:
            scored = client.compare_scores(text, choices)
            table, served = _token_changes(scored), [s.served for s in scored]
        else:
            found = client.compare(text, choices, top=top, targets=target_words(client, target or ()))
            table, served = _beside(found, _score_releases(client, text, found)), [p.served for p in found]
    out.print(table)
    err.print(f"[dim]{counted(len(served), 'release')} of {served[0].tenant}[/]")


def _choices(names: Sequence[str]) -> Iterator[int | str]:
    for name in names:
        if numbers := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", name):
            first, last = int(numbers[1]), int(numbers[2] or numbers[1])
            if not 0 <= last - first < 256:
                raise typer.BadParameter(f"{name}: write 1-8, at most 256 releases", param_hint="--release")
            yield from range(first, last + 1)
        elif NAME.fullmatch(name.removesuffix(CANARY)):
            yield 0 if name == "unpatched" else name
        else:
            text = f"{name!r}: write a number, numbers such as 1-8, a channel, or unpatched"
            raise typer.BadParameter(text, param_hint="--release")


def _score_releases(client: Client, text: str, found: Sequence[Prediction]) -> Mapping[int, Score]:
    """Of the same releases, by number: a channel may have moved meanwhile. None of a text of one token."""
    numbers = sorted({prediction.served.release for prediction in found})
    try:
        return {score.served.release: score for score in client.compare_scores(text, numbers)}
    except InvalidRequest as error:
        if error.reason != "TOO_SHORT":
            raise
        return {}


def _beside(found: Sequence[Prediction], scores: Mapping[int, Score]) -> Table:
    table = _comparison_table("log p", "perplexity", *(f"p({token.text!r})" for token in found[0].targets))
    table.add_column("likeliest next")
    for prediction in found:
        likeliest = [Text(f"{token.text!r} {percent(token)}") for token in prediction.top]
        table.add_row(
            _release_name(prediction.served),
            *_likelihood(scores.get(prediction.served.release)),
            *map(percent, prediction.targets),
            Columns(likeliest, padding=(0, 2)) if out.is_terminal else Text("  ").join(likeliest),
        )
    return table


def _token_changes(scored: Sequence[Score]) -> Table:
    """With the token that each release changes most, against the first one."""
    table = _comparison_table("log p", "perplexity")
    table.add_column("most changed")
    for score in scored:
        changes = [_change(mine, first) for mine, first in zip(score.tokens, scored[0].tokens, strict=True)]
        at = max(range(len(changes)), key=lambda n: abs(changes[n]))
        changed = f"{score.tokens[at].text!r} {changes[at]:+.3f}" if changes[at] else "–"
        table.add_row(_release_name(score.served), *_likelihood(score), Text(changed))
    return table


def _change(mine: Token, first: Token) -> float:
    """Of the log-probability: none where both are −∞, as of a word that both releases forbid."""
    own, other = _log_probability(mine), _log_probability(first)
    return 0.0 if own == other else own - other


def _comparison_table(*figures: str) -> Table:
    table = Table(box=None)
    table.add_column("release", no_wrap=True)
    for name in figures:
        table.add_column(Text(name), justify="right")
    return table


def _likelihood(score: Score | None) -> tuple[str, str]:
    return (f"{score.log_probability:.3f}", f"{score.perplexity:.2f}") if score else ("–", "–")


def _log_probability(token: Token) -> float:
    """Of the first token, which nothing stands before, 0."""
    return token.log_probability or 0.0


def _release_name(served: Served) -> str:
    name = f"{served.channel}, {served.release}" if served.channel else str(served.release or "unpatched")
    return f"{name} ({served.digest[:8]})"
