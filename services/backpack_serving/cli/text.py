"""Commands that call the gateway: generate, score, explain, senses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from backpack_proto.v1 import inference_pb2 as pb
from rich.table import Table
from rich.text import Text

from backpack_serving.cli.client import AsTenant, Channel, Key, as_caller, err, out
from backpack_serving.cli.pages import write_generation, write_word
from backpack_serving.client import Sampling, Served


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    tenant: AsTenant = "harbour",
    key: Key = "",
    channel: Channel = "live",
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.7,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0 for all.", min=0)] = 30,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.", min=0)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    explain: Annotated[
        int, typer.Option(help="How many (position, sense) to show for each new token.", min=0, max=64)
    ] = 0,
    request_key: Annotated[
        str, typer.Option(help="Such as a user's id: under a canary, the same key always gets the same release.")
    ] = "",
) -> None:
    """Go on from a prompt, steered by the tenant's release; the text streams as it is made."""
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed, tuple(stop or ()))
    if explain:
        _generate_explained(prompt, sampling, explain, tenant, key, channel)
        return
    with as_caller(tenant, key) as client:
        for part in client.text.stream(prompt, sampling, channel=channel, request_key=request_key):
            if part.served:
                served = part.served
                out.print(Text(prompt, style="dim"), end="", soft_wrap=True)
            out.print(Text(part.text), end="", soft_wrap=True)
        out.print()
    _footnote(served, f"{part.prompt_tokens} + {part.generated_tokens} tokens")


def _generate_explained(prompt: str, sampling: Sampling, limit: int, tenant: str, key: str, channel: str) -> None:
    request = pb.GenerateStreamRequest(
        prompt=pb.Prompt(text=prompt),
        channel=channel,
        sampling=sampling.message(),
        explain=pb.ExplainOptions(limit=limit),
    )
    made: list[pb.Token] = []
    with as_caller(tenant, key) as client:
        for part in client.inference.GenerateStream(request, metadata=client.metadata):
            if part.HasField("served"):
                served = Served.of(part.served)
                out.print(Text(prompt, style="dim"), end="", soft_wrap=True)
            out.print(Text(part.text), end="", soft_wrap=True)
            made += part.tokens
        out.print()
    out.print(_explained(made))
    _footnote(served, f"{part.usage.prompt_tokens} + {part.usage.generated_tokens} tokens")


def _explained(tokens: Sequence[pb.Token]) -> Table:
    table = Table("token", "logit", "from", box=None)
    for token in tokens:
        found = token.explanation
        terms = "  ".join(f"{c.contribution:+.2f} {c.token.text!r}·{c.sense}" for c in found.contributions)
        table.add_row(
            Text(repr(token.text)), f"{found.logit:.2f}", Text(f"{terms}  {found.unlisted:+.2f} the others")
        )
    return table


def score(
    text: Annotated[str, typer.Argument(help="Text of at least two tokens.")],
    tenant: AsTenant = "harbour",
    key: Key = "",
    channel: Channel = "live",
) -> None:
    """How likely each token of a text is, under the tenant's release."""
    with as_caller(tenant, key) as client:
        answer = client.text.score(text, channel=channel)
    table = Table("token", "log p", box=None)
    for token in answer.tokens:
        known = token.log_probability
        table.add_row(Text(repr(token.text)), "–" if known is None else f"{known:.3f}")
    out.print(table)
    _footnote(answer.served, f"log p {answer.log_probability:.3f}, perplexity {answer.perplexity:.2f}")


def explain(
    prompt: Annotated[str, typer.Argument(help="What stands before the token.")],
    target: Annotated[str, typer.Option(help="Word to explain; the likeliest next token if none.")] = "",
    limit: Annotated[int, typer.Option(help="How many contributions.", min=1, max=1000)] = 12,
    page: Annotated[
        Path | None,
        typer.Option("--html", help="Go on from the prompt, and write a page that explains every token."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="With --html: how many tokens.", min=1)] = 24,
    temperature: Annotated[float, typer.Option(help="With --html: 0 is greedy.", min=0.0)] = 0.7,
    top_k: Annotated[int, typer.Option(help="With --html: only the k likeliest tokens; 0 for all.", min=0)] = 30,
    seed: Annotated[int, typer.Option(help="With --html: the same seed gives the same text.", min=0)] = 0,
    tenant: AsTenant = "harbour",
    key: Key = "",
    channel: Channel = "live",
) -> None:
    """Which (position, sense) makes the next token likely: exact terms of the sum that is its logit."""
    if page is not None:
        sampling = pb.Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)
        with as_caller(tenant, key) as client:
            made = write_generation(client, prompt, channel, sampling, page)
        out.print(Text(prompt, style="dim") + Text(made.text), soft_wrap=True)
        _footnote(made.served, f"{page}: {len(made.tokens)} tokens explained")
        return
    with as_caller(tenant, key) as client:
        answer = client.text.explain(prompt, target or None, limit, channel=channel)
    table = Table("position", "token", "sense", "weight α", "× topic", "contribution", "", box=None)
    largest = max((abs(c.contribution) for c in answer.contributions), default=1.0) or 1.0
    for c in answer.contributions:
        bar = Text(
            "█" * max(1, round(20 * abs(c.contribution) / largest)), "green" if c.contribution > 0 else "red"
        )
        table.add_row(
            str(c.position),
            Text(repr(c.token.text)),
            str(c.sense),
            f"{c.weight:.3f}",
            f"{c.multiplier:.2f}",
            f"{c.contribution:+.3f}",
            bar,
        )
    out.print(Text(f"logit of {answer.target.text!r}: {answer.logit:.3f}"), end=" ")
    out.print(f"(log p {answer.target.log_probability:.3f}); {answer.unlisted:+.3f} of it isn't listed")
    out.print(table)
    _footnote(answer.served)


def senses(
    word: Annotated[str, typer.Argument(help="One word; it is looked up with a leading space.")],
    limit: Annotated[int, typer.Option(help="Tokens at each end.", min=1, max=100)] = 6,
    neighbours: Annotated[
        int, typer.Option(help="Words to list whose same sense lies nearest.", min=0, max=100)
    ] = 0,
    page: Annotated[Path | None, typer.Option("--html", help="Page to write as well.")] = None,
    tenant: AsTenant = "harbour",
    key: Key = "",
    channel: Channel = "live",
) -> None:
    """What each sense of a word predicts, and what it speaks against, under the tenant's release."""
    near = neighbours or (limit if page is not None else 0)
    request = pb.ListSensesRequest(word=pb.Word(text=word), limit=limit, channel=channel, neighbours=near)
    with as_caller(tenant, key) as client:
        answer = client.inference.ListSenses(request, metadata=client.metadata)
    table = Table("sense", "norm", "raises", "lowers", *(["near"] if near else []), box=None)
    for sense in answer.senses:
        mark = " [yellow]edited[/]" if sense.edited else ""
        words = [_words(some) for some in (sense.positive, sense.negative, sense.neighbours)]
        table.add_row(f"{sense.sense}{mark}", f"{sense.norm:.2f}", *words[: 3 if near else 2])
    out.print(table)
    if page is not None:
        write_word(word, answer, page)
        err.print(f"[dim]{page}[/]")
    _footnote(answer.served)


def _words(scored: object) -> Text:
    return Text(" ".join(s.token.text.strip() or repr(s.token.text) for s in scored))  # type: ignore[attr-defined]


def _footnote(served: Served | pb.Served, note: str = "") -> None:
    digest = served.release_digest if isinstance(served, pb.Served) else served.digest
    canary = ", the canary" if served.canary else ""
    err.print(
        f"[dim]{note + '; ' if note else ''}{served.tenant}/{served.channel}, release {served.release} "
        f"({digest[:12]}){canary}[/]"
    )
