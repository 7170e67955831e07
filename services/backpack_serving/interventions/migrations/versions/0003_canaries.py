"""Channels know the releases that they were at before, and may have a canary."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    for name, default in (("earlier", "[]"), ("canary_digest", ""), ("salt", ""), ("aborted", "")):
        op.add_column("channels", sa.Column(name, text, nullable=False, server_default=default))
    for name in ("moved", "permille"):
        op.add_column("channels", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("channels", sa.Column("canary", sa.BigInteger, nullable=True))
