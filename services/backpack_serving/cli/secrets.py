"""`backpack secrets`: the keys and passwords that the parts of a deployment know each other by."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Annotated

import typer

from backpack_serving.auth.keys import ApiKeySecret
from backpack_serving.cli.client import exits, out

OWNER, SERVICE = "backpack_owner", "backpack"
"""Roles of the database: who owns the schema and migrates it, and who the intervention service is."""

COMPOSE = "postgres:5432/backpack"
"""Where docker-compose.yml has PostgreSQL."""

PLACE = re.compile(r"(\[[\da-fA-F:]+\]|[^\s/@:?#\[\]]+)(:\d{1,5})?/[^\s/@?#]+(\?[^\s#]+)?")
"""Of a database: host, port, name, and options such as ?sslmode=require."""


def make(database: str) -> dict[str, str]:
    """New secrets by name. Those that begin with `backpack_` are settings, read in /run/secrets."""
    owner, service = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    return {
        "backpack_admin_key": str(ApiKeySecret.mint()),
        "backpack_service_key": str(ApiKeySecret.mint()),
        "database_owner_password": owner,
        "database_service_password": service,
        "owner_database": f"postgresql://{OWNER}:{owner}@{database}",
        "backpack_database": f"postgresql://{SERVICE}:{service}@{database}",
        "grafana_password": secrets.token_urlsafe(32),
    }


def write(
    folder: Annotated[Path, typer.Argument(file_okay=False, help="Where to put them, one in a file.")],
    database: Annotated[
        str,
        typer.Option(metavar="HOST:PORT/NAME", help=f"Where PostgreSQL is; {COMPOSE}, the one of compose, if none."),
    ] = "",
) -> None:
    """Create the missing secrets of a deployment, one file each. docker-compose.yml mounts them.

    On Kubernetes: kubectl create secret generic backpack --from-file=FOLDER
    """
    with exits():
        if database and not PLACE.fullmatch(database):
            raise ValueError(f"--database {database!r}: write HOST:PORT/NAME, such as db.example:5432/backpack")
        folder.mkdir(parents=True, exist_ok=True)
        made = make(database or COMPOSE)
        if others := sorted({file.name for file in folder.iterdir()} - made.keys()):
            # It is closed to everybody, and all of it may become a Secret.
            raise FileExistsError(f"{folder} holds {others[0]}, which is no secret; name a folder for them")
        # Nobody passes; the files are mounted one by one, and read by whoever a container runs as.
        folder.chmod(0o700)
        there = [name for name in made if (folder / name).exists()]
        if there and len(there) < len(made):
            # Some are parts of others: a new password beside an old URL would be a riddle.
            missing = ", ".join(sorted(made.keys() - set(there)))
            raise FileExistsError(f"{folder} has only some of the secrets; bring back {missing}, or empty it")
        if there and database and not (folder / "backpack_database").read_text().endswith(f"@{database}"):
            raise FileExistsError(f"{folder} has secrets of another database than {database}; empty it")
        if not there:
            for name, value in made.items():
                (folder / name).write_text(value)
                (folder / name).chmod(0o644)
        out.print(f"{'made' if not there else 'found'} {len(made)} secrets in {folder}")
