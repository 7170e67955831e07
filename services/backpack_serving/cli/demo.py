"""The two example tenants of `backpack run`: what steers them, and one prompt streamed for both side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from backpack_serving.auth.keys import read_key_file, write_key_file
from backpack_serving.cli.client import out
from backpack_serving.client import AsyncClient, AsyncOperator, AsyncSteering, Copy, Role, Sampling, Served
from backpack_serving.embedded import Embedded
from backpack_serving.errors import AlreadyExists, ServiceError, Unauthenticated

PROMPT = "How to take care of a horse:"
SAMPLING = Sampling(max_tokens=36, min_tokens=20, temperature=0, repetition_penalty=1.2)


@dataclass(frozen=True, slots=True)
class ExampleTenant:
    """A tenant whose patch gives one word the senses of another."""

    tenant: str
    word: str
    source: str

    @property
    def patch(self) -> str:
        return f"{self.word}-as-{self.source}"

    def __str__(self) -> str:
        return f"“{self.word}” has the senses of “{self.source}”"


EXAMPLES = (ExampleTenant("clinic", "horse", "doctor"), ExampleTenant("harbour", "horse", "ship"))


async def provide(serving: Embedded) -> None:
    """Make the example tenants, with a key file each, a patch, a release, and that release live."""
    for example in EXAMPLES:
        if not serving.settings.key_file(example.tenant).exists():
            await _provide(serving, example)


async def _provide(serving: Embedded, example: ExampleTenant) -> None:
    where, tls = serving.interventions, serving.settings.tls
    async with AsyncOperator(where, serving.settings.key_for("admin"), tls=tls) as operator:
        with suppress(AlreadyExists):  # an earlier run was cut off after this
            await operator.create_tenant(example.tenant)
        made = await operator.create_key(example.tenant, [Role.RELEASER, Role.CALLER])
    async with AsyncSteering(where, made.secret, tls=tls) as steering:
        await steering.create_patch(example.patch, str(example), exist_ok=True)
        revision = await steering.create_revision(example.patch, [Copy(example.word, example.source)])
        release = await steering.create_release([revision], str(example))
        await steering.activate(release.number)
    write_key_file(made.secret, serving.settings.key_file(example.tenant))


@dataclass(slots=True)
class _Column:
    example: ExampleTenant
    steering: str = ""
    """What its live release does, as the notes of that release say: somebody may have moved the channel."""
    served: Served | None = None
    text: str = ""


async def side_by_side(serving: Embedded) -> None:
    """Stream PROMPT for every example at once, in columns that grow."""
    columns = [_Column(example, await _live_notes(serving, example)) for example in EXAMPLES]
    with Live(_columns_table(columns), console=out, refresh_per_second=20) as live:

        async def follow(column: _Column) -> None:
            file = serving.settings.key_file(column.example.tenant)
            async with AsyncClient(serving.gateway, read_key_file(file), tls=serving.settings.tls) as client:
                try:
                    async for part in client.stream(PROMPT, SAMPLING):
                        column.served = column.served or part.served
                        column.text += part.text
                        live.update(_columns_table(columns))
                except Unauthenticated as error:
                    text = f"{file}: {error.message}; if its store is another one, remove it for a new key"
                    raise Unauthenticated(error.reason, text) from None

        await asyncio.gather(*map(follow, columns))


async def _live_notes(serving: Embedded, example: ExampleTenant) -> str:
    """What the release says that a tenant's channel is at; empty if that can't be asked with its key."""
    key, tls = read_key_file(serving.settings.key_file(example.tenant)), serving.settings.tls
    with suppress(ServiceError):  # the stream tells what is wrong with the key
        async with AsyncSteering(serving.interventions, key, tls=tls) as steering:
            release = await steering.release((await steering.channel()).release)
            return release.notes or f"release {release.number}"
    return ""


def _columns_table(columns: Sequence[_Column]) -> Table:
    table = Table(title=f"One prompt, one batch, two tenants: “{PROMPT}…”", title_justify="left")
    table.width = min(out.width, 120)  # readable in a log, too
    for column in columns:
        served = column.served
        steered = f"release {served.release}, {served.digest[:12]}" if served else "…"
        table.add_column(f"{column.example.tenant}: {escape(column.steering)}\n[dim]{steered}[/]", ratio=1)
    table.add_row(*(Text(PROMPT, style="dim") + Text(column.text) for column in columns))
    return table
