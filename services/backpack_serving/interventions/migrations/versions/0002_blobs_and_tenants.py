"""Bytes of revisions by digest, tombstones, suspended tenants; on PostgreSQL, row level security."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

OF_TENANTS = ("tenants", "keys", "patches", "blobs", "revisions", "releases", "channels", "events")


def upgrade() -> None:
    postgres = op.get_bind().dialect.name == "postgresql"
    text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.create_table(
        "blobs",
        sa.Column("tenant", text, primary_key=True),
        sa.Column("digest", text, primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.execute(
        "INSERT INTO blobs (tenant, digest, data) SELECT tenant, digest, blob FROM revisions r WHERE NOT EXISTS "
        "(SELECT 1 FROM revisions o WHERE o.tenant = r.tenant AND o.digest = r.digest "
        "AND (o.patch, o.number) < (r.patch, r.number))"
    )
    op.drop_column("revisions", "blob")
    for table, column in (("tenants", "suspended"), ("patches", "deleted")):
        op.add_column(table, sa.Column(column, sa.Boolean, nullable=False, server_default=sa.false()))
    if postgres:
        op.execute(
            "CREATE TRIGGER blobs_never_change BEFORE UPDATE OR DELETE OR TRUNCATE ON blobs "
            "FOR EACH STATEMENT EXECUTE FUNCTION backpack_never_change()"
        )
        for table in OF_TENANTS:
            op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
            seen = "current_setting('backpack.tenant', true) IN ('*', tenant)"
            op.execute(f"CREATE POLICY of_tenant ON {table} USING ({seen})")
        return
    for action in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER blobs_no_{action.lower()} BEFORE {action} ON blobs "
            "BEGIN SELECT RAISE(ABORT, 'blobs never change'); END"
        )
