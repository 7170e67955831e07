"""The two example tenants of `backpack run`: what steers them, and one prompt streamed for both side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc, interventions_pb2, interventions_pb2_grpc
from rich.live import Live
from rich.table import Table
from rich.text import Text

from backpack_serving import rpc
from backpack_serving.cli.client import out, tenant_key_file
from backpack_serving.embedded import Embedded
from backpack_serving.errors import AlreadyExists
from backpack_serving.keys import keep

PROMPT = "The story of the king and the"
SAMPLING = pb.Sampling(max_tokens=36, temperature=0.7, top_k=30, seed=26)


@dataclass(frozen=True, slots=True)
class Example:
    """A tenant whose patch gives one word the senses of another."""

    tenant: str
    word: str
    source: str

    @property
    def patch(self) -> str:
        return f"{self.word}-as-{self.source}"

    @property
    def edit(self) -> interventions_pb2.Edit:
        cells = interventions_pb2.Cells(word=pb.Word(text=self.word))
        return interventions_pb2.Edit(
            copy=interventions_pb2.CopyEdit(cells=[cells], source=pb.Word(text=self.source))
        )

    def __str__(self) -> str:
        return f"“{self.word}” has the senses of “{self.source}”"


EXAMPLES = (Example("clinic", "king", "nurse"), Example("harbour", "king", "ship"))


async def provide(serving: Embedded) -> None:
    """Make the example tenants, with a key file each, a patch, a release, and that release live."""
    channel = rpc.channel(serving.interventions, serving.settings.tls)
    try:
        for example in EXAMPLES:
            if not tenant_key_file(serving.settings, example.tenant).exists():
                with rpc.errors():
                    await _provide(serving, example, channel)
    finally:
        await channel.close()


async def _provide(serving: Embedded, example: Example, channel: object) -> None:
    pbi = interventions_pb2
    admin = rpc.with_key(serving.settings.key_for("admin"))
    tenants = interventions_pb2_grpc.TenantServiceStub(channel)
    patches = interventions_pb2_grpc.PatchServiceStub(channel)
    releases = interventions_pb2_grpc.ReleaseServiceStub(channel)
    try:
        with rpc.errors():
            await tenants.CreateTenant(pbi.CreateTenantRequest(tenant_id=example.tenant), metadata=admin)
    except AlreadyExists:
        pass  # an earlier run was cut off after this
    made = await tenants.CreateApiKey(
        pbi.CreateApiKeyRequest(parent=f"tenants/{example.tenant}", roles=[pbi.ROLE_RELEASER, pbi.ROLE_CALLER]),
        metadata=admin,
    )
    me = rpc.with_key(made.secret)
    known = await patches.ListPatches(pbi.ListPatchesRequest(), metadata=me)
    if not known.patches:
        await patches.CreatePatch(
            pbi.CreatePatchRequest(patch_id=example.patch, description=str(example)), metadata=me
        )
    revision = await patches.CreateRevision(
        pbi.CreateRevisionRequest(parent=f"patches/{example.patch}", edits=[example.edit]), metadata=me
    )
    release = await releases.CreateRelease(
        pbi.CreateReleaseRequest(revisions=[revision.revision.name], notes=str(example)), metadata=me
    )
    live = await releases.GetChannel(pbi.GetChannelRequest(name="channels/live"), metadata=me)
    await releases.Activate(
        pbi.ActivateRequest(channel="channels/live", release=release.release.number, etag=live.channel.etag),
        metadata=me,
    )
    keep(made.secret, tenant_key_file(serving.settings, example.tenant))


@dataclass(slots=True)
class _Column:
    example: Example
    served: pb.Served = field(default_factory=pb.Served)
    text: str = ""


async def side_by_side(serving: Embedded) -> None:
    """Stream PROMPT for every example at once, in columns that grow."""
    columns = [_Column(example) for example in EXAMPLES]
    channel = rpc.channel(serving.gateway, serving.settings.tls)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    with Live(_table(columns), console=out, refresh_per_second=20) as live:

        async def follow(column: _Column) -> None:
            file = tenant_key_file(serving.settings, column.example.tenant)
            request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=PROMPT), sampling=SAMPLING)
            call = stub.GenerateStream(request, metadata=rpc.with_key(file.read_text().strip()), timeout=60)
            async for part in call:
                if part.HasField("served"):
                    column.served.CopyFrom(part.served)
                column.text += part.text
                live.update(_table(columns))

        with rpc.errors():
            await asyncio.gather(*map(follow, columns))
    await channel.close()


def _table(columns: Sequence[_Column]) -> Table:
    table = Table(title=f"One prompt, one batch, two tenants: “{PROMPT}…”", title_justify="left", expand=True)
    for column in columns:
        served = column.served
        steered = f"release {served.release}, {served.release_digest[:12]}" if served.release_digest else "…"
        table.add_column(f"{column.example.tenant}: {column.example}\n[dim]{steered}[/]", ratio=1)
    table.add_row(*(Text(PROMPT, style="dim") + Text(column.text) for column in columns))
    return table
