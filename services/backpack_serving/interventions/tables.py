"""The schema in code: records map one to one onto tables. `migrations/` makes them; a test compares the two."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, get_type_hints

import sqlalchemy as sa

from backpack_serving.interventions.records import KINDS, KeyRecord, ReleaseRecord, ReplyRecord, kind_name


class Timestamp(sa.types.TypeDecorator[datetime]):
    """A moment in UTC, kept as microseconds: the same on every database, exact, and ordered."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> int | None:
        return None if value is None else round(value.timestamp() * 1e6)

    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else datetime.fromtimestamp(value / 1e6, UTC)


# Pages are told in the order of code points, whatever language the database was made for.
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

_TYPES: dict[Any, sa.types.TypeEngine[Any]] = {
    str: TEXT,
    int: sa.BigInteger(),
    int | None: sa.BigInteger(),
    float: sa.Double(),
    bool: sa.Boolean(),
    bytes: sa.LargeBinary(),
    datetime: Timestamp(),
}

metadata = sa.MetaData()
head = sa.Table(
    "head",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("hash", TEXT, nullable=False),
)


def _table_of(kind: type[Any]) -> sa.Table:
    hints = get_type_hints(kind)
    columns = [
        sa.Column(
            f.name,
            _TYPES[hints[f.name]],
            primary_key=f.name in kind.KEY,
            autoincrement=False,
            nullable=hints[f.name] == int | None,
        )
        for f in fields(kind)
    ]
    return sa.Table(_plural(kind_name(kind).lower()), metadata, *columns)


def _plural(name: str) -> str:
    irregular = {"patch": "patches", "reply": "replies", "releasestatus": "release_statuses"}
    return irregular.get(name, name + "s")


tables: dict[type[Any], sa.Table] = {kind: _table_of(kind) for kind in KINDS}
sa.Index("keys_by_id", tables[KeyRecord].c.key, unique=True)
sa.Index("releases_by_digest", tables[ReleaseRecord].c.tenant, tables[ReleaseRecord].c.digest)
sa.Index("replies_by_age", tables[ReplyRecord].c.created)
