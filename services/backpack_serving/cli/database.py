"""`backpack database …`: what operators do to the database itself, where it is, without a running service."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

import typer
from backpack_lm.counted import counted

from backpack_serving.cli.client import exits, out
from backpack_serving.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    help="""Manage the database of the intervention service (`BACKPACK_DATABASE`; SQLite in the state folder).

    On PostgreSQL: make a database, a role that owns it, and a role for the service (CREATE ROLE backpack LOGIN).
    Then `BACKPACK_DATABASE=postgresql://owner@host/name backpack database migrate --role backpack`, and start the
    service with the URL of that role. It owns nothing, so it can't lift what keeps tenants apart.
    """,
)


@app.command()
def migrate(
    role: Annotated[str, typer.Option(help="PostgreSQL: role to grant access to.")] = "",
) -> None:
    """Migrate the schema. Safe to repeat, and to run concurrently. SQLite is migrated at every start.

    A database that doesn't answer yet is waited for, as long as BACKPACK_START_WAIT says.
    """
    from backpack_serving import starting
    from backpack_serving.interventions import database
    from backpack_serving.observability.telemetry import configure

    with exits():
        settings = Settings()
        configure(settings, "migrations")

        async def reached() -> None:
            await starting.blocking(partial(database.reach, settings.database_url))

        asyncio.run(starting.wait_for("the database", reached, settings.start_wait))
        with out.status("migrating"):
            database.migrate(settings.database_url, role)
        out.print("the schema is up to date" + (f"; {role} may use it" if role else ""))


@app.command()
def verify() -> None:
    """Verify all digests in the database, and the hash chain of the audit trail."""
    from backpack_serving.interventions import database

    with exits():
        with out.status("reading everything"):
            found = database.verify(Settings().database_url)
        out.print(
            f"intact: {counted(found.revisions, 'revision')}, {counted(found.releases, 'release')} and "
            f"{counted(found.entries, 'audit entry', 'audit entries')}, "
            f"up to revision {found.position.revision} of epoch {found.position.epoch}"
        )


@app.command()
def restored() -> None:
    """Begin a new epoch. Run this once after restoring a backup, before starting the service.

    Gateways and replicas may know of changes that the backup doesn't have. In a new epoch they take everything
    anew: what was changed is as in the backup again. What was made since stays with those that know it.
    """
    from backpack_serving.interventions import database

    with exits():
        position = database.raise_epoch(Settings().database_url)
        out.print(f"epoch {position.epoch} begins at revision {position.revision}")
