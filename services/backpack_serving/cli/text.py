"""Commands that ask the gateway about a text or a word: score, explain, senses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from backpack_lm.counted import counted
from rich.table import Table
from rich.text import Text

from backpack_serving.cli.client import (
    AsTenant,
    CalledChannel,
    Key,
    Page,
    ReleaseNumber,
    as_caller,
    bare_text,
    contribution_bar,
    err,
    footnote,
    in_a_folder,
    out,
    percent,
)
from backpack_serving.cli.find import target_words
from backpack_serving.cli.pages import write_generation, write_word
from backpack_serving.client import Sampling, Token


def score(
    text: Annotated[str, typer.Argument(help="Text of at least two tokens.")],
    tenant: AsTenant = "",
    key: Key = "",
    channel: CalledChannel = "live",
    release: ReleaseNumber = None,
) -> None:
    """Score each token of a text under the tenant's release.

    `backpack score "The captain of the ship and the sea" --as harbour`
    """
    with as_caller(tenant, key) as client:
        answer = client.score(text, channel=channel, release=release)
    out.print(ranked_table(answer.tokens))
    footnote(answer.served, f"log p {answer.log_probability:.3f}, perplexity {answer.perplexity:.2f}")


def ranked_table(tokens: Iterable[Token]) -> Table:
    """Each token of a text, its log p, and the likeliest tokens in its place, if any were asked for."""
    rows = list(tokens)
    listed = any(token.alternatives for token in rows)
    table = Table("token", "log p", *(["likeliest"] if listed else []), box=None)
    for token in rows:
        known = token.log_probability
        others = "  ".join(f"{other.text!r} {percent(other)}" for other in token.alternatives)
        table.add_row(
            Text(repr(token.text)), "–" if known is None else f"{known:.3f}", *([Text(others)] if listed else [])
        )
    return table


def explain(
    prompt: Annotated[str, typer.Argument(help="Text before the token.")],
    target: Annotated[str, typer.Option(help="Word to explain (default: the likeliest next token).")] = "",
    limit: Annotated[int, typer.Option(help="Number of contributions to show.", min=1, max=1000)] = 12,
    page: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Continue the prompt, and write a page that explains every token.",
            callback=in_a_folder,
            dir_okay=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="With --html: number of tokens.", min=1)] = 24,
    temperature: Annotated[
        float | None, typer.Option(help="With --html: 0 is greedy (default: the model's).", min=0.0)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="With --html: only the k likeliest tokens; 0 for all.", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(help="With --html: the same seed gives the same text.", min=0)] = 0,
    tenant: AsTenant = "",
    key: Key = "",
    channel: CalledChannel = "live",
    release: ReleaseNumber = None,
) -> None:
    """Explain the next token: the exact terms (position, sense) whose sum is its logit, with the release's bias.

    Of the likeliest token: `backpack explain "How to take care of a horse:"`; of another: `--target ship`

    As a page, for each token of a generation: `backpack explain "How to take care of a horse:" --html horse.html`
    """
    if page is not None:
        if target:
            raise typer.BadParameter("a page explains each token of a text, not one", param_hint="--target")
        sampling = Sampling(max_tokens, temperature, top_k, seed=seed)
        with as_caller(tenant, key) as client:
            made = write_generation(client, prompt, channel, release, sampling, page)
        out.verbatim(prompt, "dim")
        out.verbatim(made.text, end="\n")
        footnote(made.served, f"{page}: {counted(len(made.tokens), 'token')} explained")
        return
    with as_caller(tenant, key) as client:
        (word,) = target_words(client, [target]) if target else (None,)
        answer = client.explain(prompt, word, limit, channel=channel, release=release)
    table = Table("position", "token", "sense", "weight α", "× topic", "contribution", "", box=None)
    largest = max((abs(c.contribution) for c in answer.contributions), default=1.0) or 1.0
    for c in answer.contributions:
        bar = contribution_bar(c.contribution / largest, 16)
        table.add_row(
            str(c.position),
            Text(repr(c.token.text)),
            str(c.sense),
            f"{c.weight:.3f}",
            f"{c.multiplier:.2f}",
            f"{c.contribution:+.3f}",
            bar,
        )
    if answer.bias == -math.inf:
        terms = math.fsum(c.contribution for c in answer.contributions) + answer.unlisted
        out.print(Text(f"{answer.target.text!r} can't come next: the release forbids it, so its logit is −∞"))
        out.print(f"its senses add up to {terms:.3f}; {answer.unlisted:+.3f} of that isn't listed")
    else:
        out.print(Text(f"logit of {answer.target.text!r}: {answer.logit:.3f}"), end=" ")
        out.print(f"(log p {answer.target.log_probability:.3f}); {answer.unlisted:+.3f} of it isn't listed")
        if answer.bias:
            out.print(f"release's bias on this word: {answer.bias:+.3f}")
    out.print(table)
    footnote(answer.served)


def senses(
    word: Annotated[str, typer.Argument(help="One word; it is looked up with a leading space.")],
    limit: Annotated[int, typer.Option(help="Tokens at each end.", min=1, max=100)] = 6,
    neighbours: Annotated[
        int, typer.Option(help="Number of words to list whose same sense is nearest.", min=0, max=100)
    ] = 0,
    page: Page = None,
    tenant: AsTenant = "",
    key: Key = "",
    channel: CalledChannel = "live",
    release: ReleaseNumber = None,
) -> None:
    """Show what each sense of a word promotes and suppresses, under the tenant's release.

    `backpack senses ship`, or with the nearest words, as a page: `backpack senses ship --html ship.html`
    """
    near = neighbours or (limit if page is not None else 0)
    with as_caller(tenant, key) as client:
        answer = client.senses(word, limit, near, channel=channel, release=release)
    table = Table("sense", "norm", "raises", "lowers", *(["near"] if near else []), box=None)
    for sense in answer.senses:
        mark = " [yellow]edited[/]" if sense.edited else ""
        words = [_token_spans(some) for some in (sense.raises, sense.lowers, sense.neighbours)]
        if not sense.norm:  # all scores and cosines are 0, so any words would be listed
            words = [Text("zero", "dim"), Text(), Text()]
        table.add_row(f"{sense.number}{mark}", f"{sense.norm:.2f}", *words[: 3 if near else 2])
    out.print(table)
    if page is not None:
        write_word(word, answer, page)
        err.print(f"[dim]{page}[/]")
    footnote(answer.served, f"senses of {answer.token.text!r} ({answer.token.id})")


def _token_spans(scored: Iterable[tuple[Token, float]]) -> Text:
    return Text(" ".join(bare_text(token) for token, _ in scored))
