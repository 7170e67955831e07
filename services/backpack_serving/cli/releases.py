"""Commands that make releases and move channels: activate, roll back, canaries; and who holds what."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from backpack_proto.v1 import interventions_pb2, sync_pb2
from rich.text import Text

from backpack_serving.cli.client import (
    AsTenant,
    Channel,
    Client,
    Key,
    as_admin,
    as_caller,
    err,
    new_id,
    out,
    table,
    when,
)

pb = interventions_pb2

app = typer.Typer(no_args_is_help=True, help="Releases, and the channels that point at them.")
canary_app = typer.Typer(
    no_args_is_help=True,
    help="Give part of a channel's requests another release, watch it, then promote or abort it.\n\n"
    "A request's key decides (`generate --request-key`), always the same way; one without a key is drawn. "
    "A canary ends by itself when a replica refuses its release, or too many of its requests fail.",
)


class Waiting(StrEnum):
    """Whom to wait for."""

    none = "none"
    quorum = "quorum"
    all = "all"


WAITS = {Waiting.none: pb.WAIT_NONE, Waiting.quorum: pb.WAIT_QUORUM, Waiting.all: pb.WAIT_ALL}

Wait = Annotated[
    Waiting,
    typer.Option(help="Wait until more than half of the replicas and gateways (quorum), or all, hold the change."),
]
Timeout = Annotated[float, typer.Option(help="Seconds to wait at most.", min=0.0, max=60.0)]


@app.command("list")
def list_releases(tenant: AsTenant = "harbour", key: Key = "") -> None:
    """The tenant's releases, newest first, and which channel points where."""
    with as_caller(tenant, key) as client:
        found = client.releases.ListReleases(pb.ListReleasesRequest(page_size=100), metadata=client.metadata)
        channels = client.releases.ListChannels(pb.ListChannelsRequest(), metadata=client.metadata).channels
    shown = table("release", "digest", "made", "revisions", "notes", "channels")
    for release in found.releases:
        here = [c.name.rpartition("/")[2] for c in channels if c.release == release.number]
        parts = [name.split("/")[3] + ":" + name.rpartition("/")[2] for name in release.revisions]
        shown.add_row(
            str(release.number),
            release.digest[:12],
            when(release.create_time),
            " ".join(parts) or "–",
            Text(release.notes),
            "[green]" + " ".join(here) + "[/]",
        )
    out.print(shown)


@app.command("create")
def create_release(
    revisions: Annotated[list[str], typer.Argument(help="PATCH:NUMBER, in the order in which they apply.")],
    notes: Annotated[str, typer.Option(help="What it is for.")] = "",
    activate: Annotated[bool, typer.Option(help="Point the channel at it at once.")] = False,
    channel: Channel = "live",
    wait: Wait = Waiting.none,
    timeout: Timeout = 10.0,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Make a release of revisions.

    Two patches together, at once live: `backpack release create royal:1 nautical:3 --activate`
    """
    names = []
    for revision in revisions:
        patch, colon, number = revision.rpartition(":")
        if not colon:
            raise typer.BadParameter(f"{revision!r}; write PATCH:NUMBER, such as debias:3")
        names.append(f"patches/{patch}/revisions/{number}")
    with as_caller(tenant, key) as client:
        request = pb.CreateReleaseRequest(revisions=names, notes=notes, request_id=new_id())
        release = client.releases.CreateRelease(request, metadata=client.metadata).release
    out.print(f"{release.name}  [dim]{release.digest}[/]")
    if activate:
        activate_release(release.number, channel, wait, timeout, tenant, key)
    else:
        out.print(f"[dim]let it steer: backpack release activate {release.number}[/]")


@app.command("activate")
def activate_release(
    number: Annotated[int, typer.Argument(help="Number of the release; 0 is the model unpatched.", min=0)],
    channel: Channel = "live",
    wait: Wait = Waiting.none,
    timeout: Timeout = 10.0,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Point a channel at a release.

    `backpack release activate 3`; on a channel beside the live one: `backpack release activate 3 --channel beta`
    """
    with as_caller(tenant, key) as client:
        channels = client.releases.ListChannels(pb.ListChannelsRequest(), metadata=client.metadata).channels
        etag = next((c.etag for c in channels if c.name.endswith(f"/{channel}")), "")
        request = pb.ActivateRequest(channel=f"channels/{channel}", release=number, etag=etag)
        _told(client.releases.Activate(_waiting(request, wait, timeout), metadata=client.metadata))


@app.command("rollback")
def rollback(
    channel: Channel = "live",
    wait: Wait = Waiting.none,
    timeout: Timeout = 10.0,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Point a channel back at the release it had before."""
    with as_caller(tenant, key) as client:
        request = pb.RollbackRequest(channel=f"channels/{channel}", etag=_etag(client, channel))
        _told(client.releases.Rollback(_waiting(request, wait, timeout), metadata=client.metadata))


@app.command("status")
def status(channel: Channel = "live", tenant: AsTenant = "harbour", key: Key = "") -> None:
    """Which replicas and gateways hold a channel's release, and its canary."""
    with as_caller(tenant, key) as client:
        request = sync_pb2.GetRolloutRequest(channel=f"channels/{channel}")
        answer = client.fleet.GetRollout(request, metadata=client.metadata)
    _line(answer.channel)
    shown = table("reader", "", "release", "holds it", "store at", "why not")
    for hold in answer.holds:
        name = sync_pb2.HoldState.Name(hold.state).removeprefix("HOLD_STATE_").lower()
        colour = {"acked": "green", "nacked": "red", "stale": "yellow"}.get(name, "default")
        shown.add_row(
            hold.reader,
            _kind(hold.kind),
            f"{hold.release}{' (canary)' if hold.canary else ''}",
            f"[{colour}]{name}[/]",
            f"{hold.position.epoch}.{hold.position.revision}",
            Text(f"{hold.reason}: {hold.message}" if hold.reason else ""),
        )
    out.print(shown if answer.holds else "no replica and no gateway has called the intervention service yet")
    if answer.HasField("canary"):
        out.print(f"under the canary: {answer.canary.requests} requests, {answer.canary.errors} failed")


def fleet() -> None:
    """Replicas and gateways: in touch or not, how far they are, what they refuse. Needs the admin key."""
    with as_admin() as client:
        answer = client.fleet.ListReaders(sync_pb2.ListReadersRequest(), metadata=client.metadata)
    out.print(f"the store is at {answer.position.epoch}.{answer.position.revision}")
    shown = table("reader", "", "in touch", "heard", "store at", "releases", "refuses")
    for reader in answer.readers:
        refusals = [f"{r.tenant}/{r.channel} {r.release_digest[:12]}: {r.reason}" for r in reader.refusals]
        shown.add_row(
            reader.reader,
            _kind(reader.kind),
            "[green]yes[/]" if reader.connected else "[yellow]no[/]",
            f"{reader.silence.ToMilliseconds() / 1000:.1f} s ago",
            f"{reader.position.epoch}.{reader.position.revision}",
            str(reader.releases) if reader.kind == sync_pb2.READER_KIND_REPLICA else "",
            Text("\n".join(refusals)),
        )
    out.print(shown)


# ---- canaries


@canary_app.command("start")
def start_canary(
    number: Annotated[int, typer.Argument(help="Number of the release to try.", min=0)],
    permille: Annotated[
        int, typer.Option(help="Of a thousand request keys, how many get it.", min=1, max=999)
    ] = 50,
    salt: Annotated[str, typer.Option(help="What keys are hashed with; drawn if none is given.")] = "",
    channel: Channel = "live",
    wait: Wait = Waiting.none,
    timeout: Timeout = 10.0,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Give part of a channel's requests a release; again, to change how many.

    One request in twenty, once all replicas hold it: `backpack canary start 4 --permille 50 --wait all`
    """
    with as_caller(tenant, key) as client:
        request = pb.StartCanaryRequest(
            channel=f"channels/{channel}",
            release=number,
            permille=permille,
            salt=salt,
            etag=_etag(client, channel),
        )
        _told(client.releases.StartCanary(_waiting(request, wait, timeout), metadata=client.metadata))
    out.print("[dim]watch it: backpack release status; then: backpack canary promote, or abort[/]")


@canary_app.command("promote")
def promote_canary(
    channel: Channel = "live",
    wait: Wait = Waiting.none,
    timeout: Timeout = 10.0,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Give the canary's release to all requests."""
    with as_caller(tenant, key) as client:
        request = pb.PromoteCanaryRequest(channel=f"channels/{channel}", etag=_etag(client, channel))
        _told(client.releases.PromoteCanary(_waiting(request, wait, timeout), metadata=client.metadata))


@canary_app.command("abort")
def abort_canary(
    channel: Channel = "live",
    wait: Wait = Waiting.none,
    timeout: Timeout = 10.0,
    tenant: AsTenant = "harbour",
    key: Key = "",
) -> None:
    """Give all requests the channel's own release again."""
    with as_caller(tenant, key) as client:
        request = pb.AbortCanaryRequest(channel=f"channels/{channel}", etag=_etag(client, channel))
        _told(client.releases.AbortCanary(_waiting(request, wait, timeout), metadata=client.metadata))


def _etag(client: Client, channel: str) -> str:
    request = pb.GetChannelRequest(name=f"channels/{channel}")
    return str(client.releases.GetChannel(request, metadata=client.metadata).channel.etag)


def _waiting(request: Any, wait: Waiting, timeout: float) -> Any:
    """The request with an id, and with whom it waits for."""
    request.request_id, request.wait = new_id(), WAITS[wait]
    request.wait_timeout.FromMicroseconds(round(timeout * 1e6))
    return request


def _told(answer: Any) -> None:
    """Where a channel is now, and how far that has come; exit status 1 if not far enough."""
    _line(answer.channel)
    if not answer.HasField("rollout"):
        return
    r = answer.rollout
    held = f"held by {r.replicas_acked} of {r.replicas} replicas, {r.gateways_acked} of {r.gateways} gateways"
    if r.complete:
        out.print(f"[green]{held}[/]")
        return
    err.print(f"[yellow]{held}[/]: the change is made, but not everywhere yet; see backpack release status")
    for refusal in r.refusals:
        err.print(refusal, markup=False)
    raise typer.Exit(1)


def _line(channel: pb.Channel) -> None:
    before = f" (before: {channel.previous_release})" if channel.HasField("previous_release") else ""
    out.print(f"{channel.name} is at release {channel.release}{before}  [dim]{channel.release_digest[:12]}[/]")
    if channel.HasField("canary"):
        c = channel.canary
        out.print(f"canary: release {c.release} for {c.permille} in a thousand request keys, salt {c.salt}")
    if channel.canary_abort_reason:
        out.print("the last canary was ended by the service: ", end="")
        out.print(channel.canary_abort_reason, markup=False)


def _kind(kind: int) -> str:
    return "gateway" if kind == sync_pb2.READER_KIND_GATEWAY else "replica"
