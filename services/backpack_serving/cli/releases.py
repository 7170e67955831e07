"""Commands that make releases and move channels: activate, roll back, canaries; and who holds what."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer
from backpack_lm.counted import counted
from rich.text import Text

from backpack_serving import client
from backpack_serving.cli import hints
from backpack_serving.cli.client import (
    AsTenant,
    AsWriter,
    Channel,
    Key,
    as_admin,
    as_admin_of_gateway,
    as_releaser,
    err,
    out,
    table,
    when,
)
from backpack_serving.cli.judging import ask_if_worse, judge_stored
from backpack_serving.client import Move, Wait

app = typer.Typer(no_args_is_help=True, help="Releases, and the channels that point at them.")
canary_app = typer.Typer(
    no_args_is_help=True,
    help="Send part of a channel's requests to another release, then promote or abort it.\n\n"
    "A request's key decides (`generate --request-key`), always the same way; one without a key is drawn. "
    "A canary ends by itself when a replica refuses its release, or too many of its requests fail.",
)

Waiting = Annotated[
    Wait,
    typer.Option(help="Wait until more than half (quorum) or all of the replicas and gateways hold the change."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Activate it even if it makes ordinary text much worse.")]
Timeout = Annotated[float, typer.Option(help="Longest wait in seconds.", min=0.0, max=60.0)]


@app.command("list")
def list_releases(
    deleted: Annotated[bool, typer.Option("--deleted", help="Show the deleted releases, too.")] = False,
    tenant: AsTenant = "",
    key: Key = "",
) -> None:
    """List the tenant's releases, newest first: what each does to ordinary text, and which channels have it as their
    release, as their canary, or as what a rollback goes back to.
    """
    with as_releaser(tenant, key) as steering:
        releases, channels = steering.releases(deleted=deleted), steering.channels()
    shown = table("release", "digest", "made", "revisions", "notes", "ordinary text", "channels")
    for release in releases:
        here = ", ".join(filter(None, (_standing(channel, release.number) for channel in channels)))
        unused = "" if release.served or not release.number else "never served"
        shown.add_row(
            str(release.number),
            release.digest[:12],
            when(release.made),
            " ".join(release.revisions) or "–",
            Text(release.notes),
            "" if release.judgement is None else f"{release.judgement.change:+.1%}",
            "[red]deleted[/]" if release.deleted else f"[green]{here}[/][dim]{unused}[/]",
        )
    out.print(shown)


@app.command("delete")
def delete_releases(
    numbers: Annotated[list[int], typer.Argument(help="Numbers of releases that were never served.", min=1)],
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Hide releases that no channel was ever at, and refuse them from then on. Their numbers stay taken."""
    with as_releaser(tenant, key) as steering:
        for number in numbers:
            out.print(f"{steering.delete_release(number).name} is deleted")


def _standing(channel: client.Channel, number: int) -> str:
    """What a release is to a channel; nothing if it is neither there nor next to it."""
    if channel.release == number:
        return channel.id
    if channel.canary and channel.canary.release == number:
        return f"{channel.id} (canary)"
    return f"{channel.id} (before)" if channel.previous == number else ""


@app.command("create")
def create_release(
    revisions: Annotated[list[str], typer.Argument(help="PATCH:NUMBER, in the order in which they apply.")],
    notes: Annotated[str, typer.Option(help="What the release is for.")] = "",
    activate: Annotated[bool, typer.Option(help="Point the channel at the new release.")] = False,
    yes: Yes = False,
    channel: Channel = "live",
    wait: Waiting = "none",
    timeout: Timeout = 10.0,
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Create a release from revisions.

    Two patches together, at once live: `backpack release create royal:1 nautical:3 --activate`
    """
    with as_releaser(tenant, key) as steering:
        release = steering.create_release(revisions, notes)
    out.print(f"{release.name}  [dim]{release.digest}[/]")
    if activate:
        activate_release(release.number, yes, channel, wait, timeout, tenant, key)
    else:
        judge_stored(tenant, key, release.number, insist=True)
        out.print(f"[dim]let it steer: {hints.again(f'release activate {release.number}', tenant, channel)}[/]")


@app.command("activate")
def activate_release(
    number: Annotated[int, typer.Argument(help="Number of the release; 0 is the model unpatched.", min=0)],
    yes: Yes = False,
    channel: Channel = "live",
    wait: Waiting = "none",
    timeout: Timeout = 10.0,
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Point a channel at a release.

    What the release does to ordinary text is shown first; if that becomes much worse (by the service's
    BACKPACK_DEGRADATION), the command asks.

    `backpack release activate 3`; on a channel beside the live one: `backpack release activate 3 --channel beta`
    """
    judge_stored(tenant, key, number, insist=yes)
    with as_releaser(tenant, key) as steering:
        etag = _etag(steering, channel)
        activate = partial(steering.activate, number, channel, etag=etag, wait=wait, wait_seconds=timeout)
        print_move(ask_if_worse(lambda allowed: activate(allow_degradation=allowed), yes), tenant)


@app.command("rollback")
def rollback(
    channel: Channel = "live",
    wait: Waiting = "none",
    timeout: Timeout = 10.0,
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Point a channel back at its previous release."""
    with as_releaser(tenant, key) as steering:
        print_move(steering.rollback(channel, wait=wait, wait_seconds=timeout), tenant)


@app.command("status")
def status(
    channel: Channel = "live",
    wait: Waiting = "none",
    timeout: Timeout = 10.0,
    tenant: AsTenant = "",
    key: Key = "",
) -> None:
    """Show which replicas and gateways hold a channel's release and its canary.

    In a script, until all do, or one refuses: `backpack release status --wait all --timeout 60`
    """
    with as_releaser(tenant, key) as steering:
        found = steering.until_held(channel, wait, seconds=timeout)
    _line(found.channel)
    shown = table("reader", "", "release", "holds it", "store at", "why not")
    for hold in found.holds:
        colour = {"acked": "green", "nacked": "red", "stale": "yellow"}.get(hold.state, "default")
        shown.add_row(
            hold.reader,
            hold.kind,
            f"{hold.release}{' (canary)' if hold.canary else ''}",
            f"[{colour}]{hold.state}[/]",
            str(hold.at),
            Text(hold.why),
        )
    out.print(shown if found.holds else "no replica and no gateway has called the intervention service yet")
    if found.tally:
        out.print(f"under the canary: {counted(found.tally.requests, 'request')}, {found.tally.failed} failed")


def fleet() -> None:
    """List replicas and gateways: connection, position, refusals. Needs the admin key."""
    with as_admin() as operator:
        found = operator.fleet()
    out.print(f"the store is at {found.at}")
    shown = table("reader", "", "in touch", "heard", "store at", "releases", "refuses", "why not in touch")
    for reader in found.readers:
        shown.add_row(
            reader.name,
            reader.kind,
            "[green]yes[/]" if reader.connected else "[yellow]no[/]",
            f"{reader.silence:.1f} s ago",
            str(reader.at),
            str(reader.releases) if reader.kind == "replica" else "",
            Text("\n".join(reader.refusals)),
            Text(reader.why),
        )
    out.print(shown)


def replicas() -> None:
    """List the gateway's replicas and their load. Needs the admin key."""
    with as_admin_of_gateway() as gateway:
        found = gateway.replicas()
    shown = table(
        "replica", "address", "running", "queued", "slots", "tokens", "sent from here", "load", "takes requests"
    )
    for one in found:
        takes = "[green]yes[/]" if one.usable else f"[yellow]{'no, it drains' if one.draining else 'no'}[/]"
        figures = map(str, (one.running, one.queued, one.slots, one.tokens, one.sent))
        shown.add_row(Text(one.id), Text(one.address), *figures, f"{one.load:.1f}", takes)
    out.print(shown if found else "the gateway knows of no replica of its model")


# ---- canaries


@canary_app.command("start")
def start_canary(
    number: Annotated[int, typer.Argument(help="Number of the release to try.", min=0)],
    permille: Annotated[
        int, typer.Option(help="How many of a thousand request keys get the release.", min=1, max=999)
    ] = 50,
    salt: Annotated[str, typer.Option(help="Salt of the hash of request keys (default: drawn at random).")] = "",
    yes: Yes = False,
    channel: Channel = "live",
    wait: Waiting = "none",
    timeout: Timeout = 10.0,
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Send part of a channel's requests to a release, or change how many.

    One request in twenty, once all replicas hold it: `backpack canary start 4 --permille 50 --wait all`
    """
    with as_releaser(tenant, key) as steering:
        start = partial(
            steering.start_canary,
            number,
            permille,
            channel,
            salt=salt,
            etag=_etag(steering, channel),
            wait=wait,
            wait_seconds=timeout,
        )
        print_move(ask_if_worse(lambda allowed: start(allow_degradation=allowed), yes), tenant)
    out.print(
        f"[dim]watch it: {hints.again('release status', tenant, channel)}; then: "
        f"{hints.again('canary promote', tenant, channel)}, or abort[/]"
    )


@canary_app.command("promote")
def promote_canary(
    yes: Yes = False,
    channel: Channel = "live",
    wait: Waiting = "none",
    timeout: Timeout = 10.0,
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """Make the canary's release the channel's release."""
    with as_releaser(tenant, key) as steering:
        etag = _etag(steering, channel)
        promote = partial(steering.promote_canary, channel, etag=etag, wait=wait, wait_seconds=timeout)
        print_move(ask_if_worse(lambda allowed: promote(allow_degradation=allowed), yes), tenant)


@canary_app.command("abort")
def abort_canary(
    channel: Channel = "live",
    wait: Waiting = "none",
    timeout: Timeout = 10.0,
    tenant: AsWriter = "",
    key: Key = "",
) -> None:
    """End the canary: all requests get the channel's own release again."""
    with as_releaser(tenant, key) as steering:
        print_move(steering.abort_canary(channel, wait=wait, wait_seconds=timeout), tenant)


def _etag(steering: client.Steering, channel: str) -> str:
    """The channel's, read once: whoever moves it while a question is asked isn't overruled by the answer."""
    try:
        return steering.channel(channel).etag
    except client.NotFound:
        return ""


def print_move(move: Move, tenant: str = "") -> None:
    """Print a channel's release and the progress of its rollout; exit with status 1 if it is incomplete."""
    _line(move.channel)
    if (r := move.rollout) is None:
        return
    held = f"held by {r.replicas_holding} of {r.replicas} replicas, {r.gateways_holding} of {r.gateways} gateways"
    if r.complete:
        out.print(f"[green]{held}[/]")
        return
    see = hints.again("release status", tenant, move.channel.id)
    err.print(f"[yellow]{held}[/]: the change is made, but not everywhere yet; see {see}")
    for refusal in r.refusals:
        err.print(refusal, markup=False)
    raise typer.Exit(1)


def _line(channel: client.Channel) -> None:
    before = "" if channel.previous is None else f" (before: {channel.previous})"
    out.print(f"{channel.name} is at release {channel.release}{before}  [dim]{channel.digest[:12]}[/]")
    if c := channel.canary:
        share = f"release {c.release} for {c.permille} in a thousand request keys"
        out.print(f"canary: {share}, salt {c.salt}", markup=False)
    if channel.canary_ended:
        out.print("the last canary was ended by the service: ", end="")
        out.print(channel.canary_ended, markup=False)
