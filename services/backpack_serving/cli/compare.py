"""`backpack compare`: one text under many releases."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from backpack_proto.v1 import inference_pb2 as pb
from rich.table import Table
from rich.text import Text

from backpack_serving.cli.client import AsTenant, Key, as_caller, err, out


def compare(
    prompt: Annotated[str, typer.Argument(help="Text whose next token is asked for, or that is scored.")],
    under: Annotated[
        list[str] | None,
        typer.Option(
            help="Release: a number (3), numbers (1-8), a channel (live), or unpatched; repeatable. "
            "If none: unpatched and live."
        ),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="Word to give the probability of; repeatable.")] = None,
    top: Annotated[int, typer.Option(help="How many of the likeliest next tokens.", min=1, max=100)] = 5,
    score: Annotated[bool, typer.Option("--score", help="How likely the text is, not what follows it.")] = False,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """The next token, or a text's score, under up to 256 releases side by side."""
    request = pb.CompareRequest(
        prompt=pb.Prompt(text=prompt),
        releases=list(_choices(under or ["unpatched", "live"])),
        mode=pb.COMPARE_MODE_SCORE if score else pb.COMPARE_MODE_NEXT_TOKEN,
        top=0 if score else top,
        targets=[pb.Word(text=word) for word in target or ()],
    )
    with as_caller(tenant, key) as client:
        answer = client.inference.Compare(request, metadata=client.metadata)
    out.print(_scores(answer) if score else _next_tokens(answer))
    whose = answer.releases[0].served.tenant
    err.print(f"[dim]{len(answer.tokens)} tokens, {len(answer.releases)} releases of {whose}[/]")


def _choices(names: Sequence[str]) -> Iterator[pb.ReleaseChoice]:
    for name in names:
        if numbers := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", name):
            first, last = int(numbers[1]), int(numbers[2] or numbers[1])
            if not 0 <= last - first < 256:
                raise typer.BadParameter(f"{name}: write 1-8, at most 256 releases", param_hint="--under")
            yield from (pb.ReleaseChoice(number=number) for number in range(first, last + 1))
        elif name == "unpatched":
            yield pb.ReleaseChoice(unpatched=True)
        else:
            yield pb.ReleaseChoice(channel=name)


def _next_tokens(answer: pb.CompareResponse) -> Table:
    targets = [repr(token.text) for token in answer.releases[0].next.targets]
    table = Table("release", *targets, "likeliest", box=None)
    for compared in answer.releases:
        likeliest = "  ".join(f"{token.text!r} {_percent(token)}" for token in compared.next.top)
        table.add_row(_name(compared.served), *map(_percent, compared.next.targets), Text(likeliest))
    return table


def _scores(answer: pb.CompareResponse) -> Table:
    """With the token that each release changes most, against the first one."""
    table = Table("release", "log p", "perplexity", "most changed", box=None)
    first = answer.releases[0].score.log_probabilities
    for compared in answer.releases:
        score = compared.score
        changes = [mine - theirs for mine, theirs in zip(score.log_probabilities, first, strict=True)]
        at = max(range(len(changes)), key=lambda n: abs(changes[n]))
        changed = f"{answer.tokens[at + 1].text!r} {changes[at]:+.3f}" if changes[at] else "–"
        table.add_row(
            _name(compared.served), f"{score.log_probability:.3f}", f"{score.perplexity:.2f}", Text(changed)
        )
    return table


def _percent(token: pb.Token) -> str:
    return f"{100 * math.exp(token.log_probability):.2f} %"


def _name(served: pb.Served) -> str:
    name = f"{served.channel}, {served.release}" if served.channel else str(served.release or "unpatched")
    return f"{name} ({served.release_digest[:12]})"
