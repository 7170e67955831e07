"""`backpack find`: the senses that speak for a word; and `backpack tokenize`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from backpack_serving.cli import hints
from backpack_serving.cli.client import (
    AsTenant,
    CalledChannel,
    Key,
    ReleaseNumber,
    as_caller,
    contribution_bar,
    err,
    footnote,
    out,
)
from backpack_serving.client import Client, FoundSense, Token

BAR = 12


def find(
    words: Annotated[list[str], typer.Argument(help="Words, one token each; looked up with a leading space.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Word to set them against; repeatable. All words if none.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Set them against nothing: bare logits, as `explain` has them.")
    ] = False,
    lowers: Annotated[bool, typer.Option("--lowers", help="Find the senses that lower the words instead.")] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Rank senses by what they add at the end of this text, exactly; repeatable, up to 16."),
    ] = None,
    by: Annotated[
        Literal["score", "use"], typer.Option(help="use: score times how often the word occurs in text.")
    ] = "score",
    limit: Annotated[int, typer.Option(help="Number of senses to show.", min=1, max=10_000)] = 20,
    tenant: AsTenant = "",
    key: Key = "",
    channel: CalledChannel = "live",
    release: ReleaseNumber = None,
) -> None:
    """Find the senses, of all words, that speak for a word most: what to edit if it is said too often, or too seldom.

    Scores are logits less the mean over all words: what raises every word alike makes none likelier.

    Whatever the text, by score: `backpack find money`; by how much they do in real text: `backpack find money --by use`

    For one word rather than another: `backpack find doctor --against nurse`; against it: `backpack find money --lowers`

    In texts of yours: `backpack find money --prompt "She went to the bank to" --prompt "The bank of the river was"`
    """
    if raw and against:
        raise typer.BadParameter("--against names words; --raw is against nothing", param_hint="--raw")
    with as_caller(tenant, key) as client:
        answer = client.find_senses(
            words,
            against or (() if raw else None),
            effect="lower" if lowers else "raise",
            order=by,
            prompts=prompt or (),
            limit=limit,
            channel=channel,
            release=release,
        )
        notes = list(_other_word_forms(client, [*words, *(against or ())], [*answer.words, *answer.against]))
    if answer.senses:
        out.print(_found_table(answer.senses, by == "use"))
    else:
        out.print(f"no sense {'lowers' if lowers else 'raises'} {'these words' if len(words) > 1 else 'this word'}")
    for note in notes:
        err.print(Text(note, "dim"))
    if (first := next(filter(_is_word, answer.senses), None)) is not None:
        word = shlex.quote(first.token.text.strip())
        edit = shlex.quote(f"scale {word}:{first.sense} 0")
        command = hints.backpack(f"try PROMPT --edit {edit}")
        err.print(Text(f"try it without sense {first.sense} of {first.token.text.strip()}: {command}", "dim"))
    footnote(answer.served)


def tokenize(
    text: Annotated[str, typer.Argument(help="A text, or one word.")],
    tenant: AsTenant = "",
    key: Key = "",
) -> None:
    """Show the tokens of a text with their ids; of one word, also those that it is inside a text.

    Commands that edit a word edit both tokens, `backpack find` and `senses` look at the one inside a text:
    `backpack tokenize horse`
    """
    with as_caller(tenant, key) as client:
        forms = [("", client.tokenize(text))]
        if len(text.split()) == 1:
            start, inside = _word_forms(client, text.strip(), _begun(client))
            forms = [("at the start of a text", start), ("inside a text", inside)]
    shown = Table(*(["" for _ in forms[1:]]), "id", "token", box=None)
    for name, tokens in forms:
        for at, token in enumerate(tokens):
            shown.add_row(*([name if at == 0 else ""] * len(forms[1:])), str(token.id), Text(repr(token.text)))
    out.print(shown)


def _found_table(senses: Sequence[FoundSense], by_use: bool) -> Table:
    """With a bar for what they are ordered by."""
    in_prompts = senses[0].contribution is not None
    shown = Table("word", "sense", "score", "in a million", *(["adds", "prompts"] if in_prompts else []), "", box=None)
    for column in shown.columns[2:-1]:
        column.justify = "right"
    sizes = [
        sense.contribution
        if sense.contribution is not None
        else sense.score * (sense.frequency or 0.0 if by_use else 1)
        for sense in senses
    ]
    largest = max(map(abs, sizes)) or 1.0
    for sense, size in zip(senses, sizes, strict=True):
        there = [f"{sense.contribution:+.3f}", str(sense.prompts)] if in_prompts else []
        shown.add_row(
            Text(repr(sense.token.text)),
            f"{sense.sense}{' [yellow]edited[/]' if sense.edited else ''}",
            f"{sense.score:+.2f}",
            "–" if sense.frequency is None else f"{sense.frequency:.1f}",
            *there,
            contribution_bar(size / largest, BAR),
        )
    return shown


def _other_word_forms(client: Client, words: Sequence[str], taken: Sequence[Token]) -> Iterable[str]:
    """For each word that is another token at the start of a text than the one that was taken: which ones these are."""
    begun = _begun(client)
    for word, token in zip(words, taken, strict=True):
        start, _ = _word_forms(client, word.strip(), begun)
        if [each.id for each in start] != [token.id]:
            inside, there = _with_ids([token]), _with_ids(start)
            yield f"{word}: the token {inside}, as inside a text; at the start of a text it is {there}"


def target_words(client: Client, words: Sequence[str]) -> list[str | Token]:
    """Words whose probability is asked for: of one of several tokens, the first, which is told."""
    begun, found = _begun(client) if words else 0, list[str | Token](words)
    for at, word in enumerate(words):
        tokens = client.tokenize(f" {word.strip()}")[begun:] if word.strip() else ()
        if len(tokens) > 1:
            err.print(Text(f"{word}: {len(tokens)} tokens; the target is the first, {_with_ids(tokens[:1])}", "dim"))
            found[at] = tokens[0]
    return found


def _begun(client: Client) -> int:
    """How many tokens begin every text."""
    return len(client.tokenize(""))


def _word_forms(client: Client, word: str, begun: int) -> tuple[tuple[Token, ...], tuple[Token, ...]]:
    """The tokens of a word at the start of a text, without the `begun` that begin every text, and inside one."""
    return client.tokenize(word)[begun:], client.tokenize(f" {word}")[begun:]


def _with_ids(tokens: Iterable[Token]) -> str:
    return " + ".join(f"{token.text!r} ({token.id})" for token in tokens)


def _is_word(sense: FoundSense) -> bool:
    """Whether commands can name it: they put a space before a word."""
    return sense.token.text == f" {sense.token.text.strip()}" != " "
