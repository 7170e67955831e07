"""The first schema."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

NEVER_CHANGED = ("revisions", "releases", "events")


def _table(name: str, key: dict[str, sa.types.TypeEngine[Any]], **columns: sa.types.TypeEngine[Any]) -> None:
    op.create_table(
        name,
        *(sa.Column(c, kind, primary_key=True, autoincrement=False) for c, kind in key.items()),
        *(sa.Column(c, kind, nullable=c == "previous") for c, kind in columns.items()),
    )


def upgrade() -> None:
    # Pages are told in the order of code points, whatever language the database was made for.
    text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    number, blob, moment = sa.BigInteger(), sa.LargeBinary(), sa.BigInteger()
    _table("head", {"id": number}, epoch=number, revision=number, hash=text)
    op.execute("INSERT INTO head (id, epoch, revision, hash) VALUES (1, 1, 0, '')")
    _table("tenants", {"tenant": text}, created=moment)
    _table(
        "keys",
        {"tenant": text, "key": text},
        roles=text,
        salt=blob,
        verifier=blob,
        created=moment,
        revoked=sa.Boolean(),
    )
    op.create_index("keys_by_id", "keys", ["key"], unique=True)
    _table("patches", {"tenant": text, "patch": text}, description=text, created=moment)
    _table(
        "revisions",
        {"tenant": text, "patch": text, "number": number},
        digest=text,
        fingerprint=text,
        blob=blob,
        created=moment,
    )
    _table(
        "releases",
        {"tenant": text, "number": number},
        digest=text,
        revisions=text,
        notes=text,
        created=moment,
    )
    op.create_index("releases_by_digest", "releases", ["tenant", "digest"])
    _table(
        "channels",
        {"tenant": text, "channel": text},
        release=number,
        digest=text,
        previous=number,
        generation=number,
        updated=moment,
    )
    _table(
        "events",
        {"revision": number},
        tenant=text,
        principal=text,
        method=text,
        resource=text,
        changes=text,
        time=moment,
        hash=text,
    )
    _table(
        "replies",
        {"principal": text, "method": text, "request_id": text},
        body=text,
        resource=text,
        revision=number,
        created=moment,
    )
    op.create_index("replies_by_age", "replies", ["created"])
    postgres = op.get_bind().dialect.name == "postgresql"
    if postgres:
        op.execute(
            "CREATE FUNCTION backpack_never_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE EXCEPTION '% never change', TG_TABLE_NAME USING ERRCODE = 'integrity_constraint_violation'; "
            "END $$"
        )
    for table in NEVER_CHANGED:
        if postgres:
            op.execute(
                f"CREATE TRIGGER {table}_never_change BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
                "FOR EACH STATEMENT EXECUTE FUNCTION backpack_never_change()"
            )
            continue
        for action in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{action.lower()} BEFORE {action} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} never change'); END"
            )
