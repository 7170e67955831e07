"""`backpack generate`: text after a prompt, as it is made; several samples, and what made each token likely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from backpack_lm.counted import counted
from backpack_lm.strict_json import UTF8
from rich.live import Live
from rich.table import Table
from rich.text import Text

from backpack_serving.cli.client import (
    AsTenant,
    CalledChannel,
    Key,
    ReleaseNumber,
    as_caller,
    contribution_bar,
    footnote,
    out,
    percent,
)
from backpack_serving.cli.text import ranked_table
from backpack_serving.client import Part, Sampling, Served, Token


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tenant: AsTenant = "",
    key: Key = "",
    channel: CalledChannel = "live",
    release: ReleaseNumber = None,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.", min=1)] = 64,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (default: the model's).", min=0.0)] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens; 0 for all.", min=0)] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest tokens of this mass.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Only tokens with this share of the likeliest one's probability.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Make tokens of the prompt and the text less likely; 1 for none.")
    ] = None,
    frequency_penalty: Annotated[
        float, typer.Option(help="Lower a token's logit each time that the text has it.", min=-2, max=2)
    ] = 0.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Lower the logits of tokens that the text has.", min=-2, max=2)
    ] = 0.0,
    min_tokens: Annotated[int, typer.Option(help="No text ends by itself before them.", min=0)] = 0,
    bad_word: Annotated[
        list[str] | None,
        typer.Option(
            help="Forbid this spelling, with and without a space before it; repeatable. Other forms of a word (Horse, "
            "horses) are other spellings.",
        ),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The text is JSON that the schema in FILE describes.", exists=True, dir_okay=False
        ),
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The whole text matches this regular expression.")] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The text follows the grammar in FILE: Lark's syntax, or GBNF.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.", min=0)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    samples: Annotated[
        int, typer.Option(help="Number of texts; sample n is what --seed + n gives alone.", min=1, max=16)
    ] = 1,
    explain: Annotated[
        int, typer.Option(help="Number of contributions to show for each new token.", min=0, max=64)
    ] = 0,
    prompt_log_probabilities: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Also show how likely each token of the prompt was, and the N likeliest in its place.",
            min=0,
            max=20,
        ),
    ] = None,
    priority: Annotated[
        int, typer.Option(help="Among your own waiting requests, the highest priority runs first.", min=-100, max=100)
    ] = 0,
    request_key: Annotated[
        str, typer.Option(help="Such as a user's id: under a canary, the same key always gets the same release.")
    ] = "",
) -> None:
    """Continue a prompt, steered by the tenant's release, and stream the text.

    Without --temperature, --top-k, --top-p, --min-p and --repetition-penalty, tokens are drawn as the model's
    defaults say. With one of them, the others leave the whole vocabulary, at temperature 1, without a penalty.

    --json-schema, --regex and --grammar hold the text to a form, and it ends where nothing may follow:
    `backpack generate "The horse is called" --regex " [A-Z][a-z]{2,9}"`. Give --max-tokens enough room: a text that is
    cut off is no whole value.

    Three texts, the same each time: `backpack generate "The king and the" --samples 3 --seed 1`

    What made each token likely: `backpack generate "The king and the" --temperature 0 --explain 3`. A token's
    logit is the sum of what each sense of each token before it contributes; the largest are shown. Positions are
    counted from the prompt's first token, which has 0.
    """
    log_probabilities = 0 if explain else None
    sampling = Sampling(
        max_tokens, temperature, top_k, top_p, seed, stop or (), log_probabilities, samples=samples, min_p=min_p,
        repetition_penalty=repetition_penalty, frequency_penalty=frequency_penalty, presence_penalty=presence_penalty,
        min_tokens=min_tokens, bad_words=bad_word or (),
        json_schema=_content(json_schema, "--json-schema"), regex=regex, grammar=_content(grammar, "--grammar"),
        prompt_log_probabilities=prompt_log_probabilities,
    )  # fmt: skip
    made = [_Made() for _ in range(samples)]
    read: Sequence[Token] = ()
    with as_caller(tenant, key) as client:
        parts = client.stream(
            prompt,
            sampling,
            explain=explain or None,
            priority=priority,
            channel=channel,
            release=release,
            request_key=request_key,
        )
        follow = _one if samples == 1 else _print_samples
        for part in follow(prompt, made, parts):
            made[part.sample].add(part)
            read = read or part.prompt
    if read:
        out.print(ranked_table(read))
    for number, sample in enumerate(made):
        if explain:
            out.print(_explanation_table(sample.tokens, f"sample {number}" if samples > 1 else None))
    assert made[0].served is not None, "the first part of each sample has it"
    footnote(made[0].served, f"{part.prompt_tokens} + {counted(part.generated_tokens, 'token')}")


def _content(file: Path | None, option: str) -> str | None:
    """The text in an option's file."""
    try:
        return file.read_text(UTF8) if file else None
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} is no text that can be read: {error}", param_hint=option) from None


@dataclass(slots=True)
class _Made:
    """A sample, as far as it has come."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    served: Served | None = None

    def add(self, part: Part) -> None:
        self.text += part.text
        self.tokens += part.tokens
        self.served = self.served or part.served


def _one(prompt: str, made: Sequence[_Made], parts: Iterator[Part]) -> Iterator[Part]:
    """The text as it comes, after the prompt."""
    first = next(parts)  # what is refused is refused here
    out.verbatim(prompt, "dim")
    try:
        for part in chain([first], parts):
            out.verbatim(part.text)
            yield part
    finally:
        out.verbatim("", end="\n")


def _print_samples(prompt: str, made: Sequence[_Made], parts: Iterator[Part]) -> Iterator[Part]:
    """All samples as they come, below the prompt."""
    first = next(parts)
    out.print(Text(prompt, style="dim"), soft_wrap=True)
    with Live(_samples(made), console=out, refresh_per_second=20, vertical_overflow="visible") as live:
        for part in chain([first], parts):
            yield part
            live.update(_samples(made))
    if not out.is_terminal:
        out.print()  # there, it ends without one


def _samples(made: Sequence[_Made]) -> Table:
    table = Table("", "text", box=None, show_header=False)
    for number, sample in enumerate(made):
        table.add_row(f"[bold]{number}[/]", Text(sample.text))
    return table


def _explanation_table(tokens: Sequence[Token], title: str | None) -> Table:
    """Each token's probability and logit, and the largest terms of that sum, a row for each."""
    explained = [(token, token.explanation) for token in tokens if token.explanation]
    largest = max((abs(c.contribution) for _, why in explained for c in why.contributions), default=1.0) or 1.0
    table = Table("token", box=None, title=title, title_justify="left")
    for name in ("p", "logit", "contribution"):
        table.add_column(name, justify="right")
    table.add_column("of token")
    for name in ("position", "sense"):
        table.add_column(name, justify="right")
    table.add_column("")
    for token, why in explained:
        begins: list[Text | str] = [Text(repr(token.text), "bold"), percent(token), f"{why.logit:.2f}"]
        for c in why.contributions:
            bar = contribution_bar(c.contribution / largest, 8)
            term = f"{c.contribution:+.2f}", Text(repr(c.token.text)), str(c.position), str(c.sense), bar
            table.add_row(*begins, *term)
            begins = ["", "", ""]
        if why.bias:
            table.add_row(*begins, f"{why.bias:+.2f}", "[dim]release's bias[/]")
            begins = ["", "", ""]
        table.add_row(*begins, f"{why.unlisted:+.2f}", "[dim]all others[/]")
    return table
