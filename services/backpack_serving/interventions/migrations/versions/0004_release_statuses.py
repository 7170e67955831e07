"""What became of releases: judged, served, deleted; and what was known of a release when a channel moved to it."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    postgres = op.get_bind().dialect.name == "postgresql"
    text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    statuses = op.create_table(
        "release_statuses",
        sa.Column("tenant", text, primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("before", sa.Double, nullable=False),
        sa.Column("after", sa.Double, nullable=False),
        sa.Column("served", sa.Boolean, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
    )
    op.add_column("channels", sa.Column("judgement", text, nullable=False, server_default=""))
    if postgres:
        op.execute("ALTER TABLE release_statuses ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE release_statuses FORCE ROW LEVEL SECURITY")
        seen = "current_setting('backpack.tenant', true) IN ('*', tenant)"
        op.execute(f"CREATE POLICY of_tenant ON release_statuses USING ({seen})")
    unjudged = {"tokens": 0, "before": 0.0, "after": 0.0, "served": True, "deleted": False}
    served = [{"tenant": tenant, "number": number, **unjudged} for tenant, number in sorted(_served_releases())]
    op.bulk_insert(statuses, served)


def _served_releases() -> set[tuple[str, int]]:
    """Releases, by tenant, that a channel was ever at or had as its canary: the audit trail knows."""
    found = set()
    for tenant, changes in op.get_bind().execute(
        sa.text("SELECT tenant, changes FROM events WHERE changes LIKE '%\"Channel\"%'")
    ):
        for change in json.loads(changes):
            if change["kind"] == "Channel":
                found |= {
                    (tenant, number) for number in (change["release"], change.get("canary")) if number is not None
                }
    return found
