"""Bringing a database's schema up to date, and knowing whether it is."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from backpack_serving.errors import Unavailable


def migrate(connection: sa.Connection) -> None:
    """Run the migrations that this database hasn't had, in the connection's transaction. Safe to repeat.

    Raises Unavailable for a database that a newer version of this program has made.
    """
    _version(connection)
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def check(connection: sa.Connection) -> None:
    """Raise Unavailable unless the schema is the one that this version needs."""
    found, needed = _version(connection), _scripts().get_current_head()
    if found != needed:
        raise Unavailable(
            "OLD_SCHEMA",
            f"the schema is at {found or 'nothing'}; run `backpack database migrate` to get to {needed}",
            retry_after=1.0,  # whoever migrates may be about to
        )


def _version(connection: sa.Connection) -> str | None:
    found = MigrationContext.configure(connection).get_current_revision()
    if found is not None and found not in {script.revision for script in _scripts().walk_revisions()}:
        raise Unavailable("NEW_SCHEMA", f"the schema is at {found}, which this version doesn't know; upgrade it")
    return found


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config
