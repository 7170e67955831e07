"""SQLite on a disk that loses power: what was written but not synced is lost, in part, in pieces, in any order.

`apsw` lets Python be the file system of the same SQLite version that the service uses; `driver()` is the little
of the DB-API that SQLAlchemy needs of it, to be put in the place of pysqlite3. Every file keeps beside its content
what a disk would hold for sure. A cut at any moment is one possible disk: that, with some of the sectors since.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apsw
import apsw.ext
import pysqlite3

SECTOR = 512


class Disk:
    """The files of one database. `moments` are called at every write and sync: a test may cut the power there."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.moments: list[Callable[[], None]] = []
        self.failing = ""
        """Files with this ending fail to sync."""
        self._safe: dict[str, bytearray] = {}
        self._written: dict[str, list[tuple[int, bytes] | int]] = {}

    def write(self, path: str, at: int, data: bytes) -> None:
        for start in range(0, len(data), SECTOR):  # each is lost or kept on its own: pages are torn
            self._written.setdefault(path, []).append((at + start, data[start : start + SECTOR]))
        self._moment()

    def truncate(self, path: str, size: int) -> None:
        self._written.setdefault(path, []).append(size)
        self._moment()

    def sync(self, path: str) -> None:
        if self.failing and path.endswith(self.failing):
            raise apsw.IOError("the disk says no")
        self._moment()
        self._apply(self._safe.setdefault(path, bytearray()), self._written.pop(path, []))

    def delete(self, path: str) -> None:
        self._safe.pop(path, None)
        self._written.pop(path, None)

    def cut(self, folder: Path) -> Path:
        """What may be on the disk if the power fails now: the database file, in a folder."""
        keep = self.random.choice([0.0, 0.5, 1.0])
        for path in {*self._safe, *self._written}:
            content = bytearray(self._safe.get(path, b""))
            kept = [change for change in self._written.get(path, []) if self.random.random() < keep]
            self.random.shuffle(kept)
            self._apply(content, kept)
            (folder / Path(path).name).write_bytes(content)
        return folder / "i.db"

    def _moment(self) -> None:
        for act in self.moments:
            act()

    @staticmethod
    def _apply(content: bytearray, changes: Sequence[tuple[int, bytes] | int]) -> None:
        for change in changes:
            if isinstance(change, int):
                del content[change:]
                continue
            at, data = change
            content.extend(bytes(max(0, at - len(content))))
            content[at : at + len(data)] = data


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self._disk, self._path = disk, name.filename() if isinstance(name, apsw.URIFilename) else str(name)

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._disk.write(self._path, offset, bytes(data))

    def xTruncate(self, size: int) -> None:
        super().xTruncate(size)
        self._disk.truncate(self._path, size)

    def xSync(self, flags: int) -> None:
        self._disk.sync(self._path)
        super().xSync(flags)


class _FileSystem(apsw.VFS):
    def __init__(self, disk: Disk) -> None:
        self.name = f"disk{id(disk)}"
        super().__init__(self.name, "")
        self._disk = disk

    def xOpen(self, name: Any, flags: list[int]) -> _File:
        return _File(self._disk, name, flags)

    def xDelete(self, name: str, sync: bool) -> None:
        super().xDelete(name, sync)
        self._disk.delete(name)


def driver(disk: Disk) -> Any:
    """A module for SQLAlchemy in place of pysqlite3, on this disk."""
    system = _FileSystem(disk)
    real = pysqlite3.dbapi2
    names = "Error DatabaseError OperationalError IntegrityError ProgrammingError DataError InterfaceError"
    errors = {name: getattr(real, name) for name in [*names.split(), "NotSupportedError", "InternalError", "Warning"]}
    return SimpleNamespace(
        **errors,
        paramstyle="qmark",
        sqlite_version_info=tuple(map(int, apsw.sqlite_lib_version().split("."))),
        connect=lambda path, **_: _Connection(apsw.Connection(path, vfs=system.name), system),
        Binary=bytes,
    )


class _Connection:
    def __init__(self, connection: apsw.Connection, system: _FileSystem) -> None:
        self._connection, self._system = connection, system  # the file system must live as long
        self.isolation_level = None

    def cursor(self) -> _Cursor:
        return _Cursor(self._connection)

    def execute(self, statement: str) -> _Cursor:
        return self.cursor().execute(statement)

    def create_function(self, *_: Any, **__: Any) -> None:
        pass

    def commit(self) -> None:
        if self._connection.get_autocommit():
            return
        meant = self._revision()
        try:
            self.execute("COMMIT")
        except pysqlite3.OperationalError:
            # Python's exceptions come through where SQLite itself says OK: when its own checkpoint after a commit
            # fails. Then so do we.
            if self._revision() != meant:
                raise

    def _revision(self) -> Any:
        """Of the store, as this connection sees it now."""
        if not list(self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'head'")):
            return None
        return list(self._connection.execute("SELECT revision FROM head"))

    def rollback(self) -> None:
        if not self._connection.get_autocommit():
            self.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()


class _Cursor:
    arraysize, lastrowid = 1, 0

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._rows: list[Any] = []
        self.description: Any = None
        self.rowcount = -1

    def execute(self, statement: str, values: Sequence[Any] = ()) -> _Cursor:
        try:
            found = apsw.ext.query_info(self._connection, statement).description
            self.description = [(name, *[None] * 6) for name, _ in found] or None
            self._rows = list(self._connection.execute(statement, tuple(values)))
        except apsw.ConstraintError as error:
            raise pysqlite3.IntegrityError(str(error)) from error
        except apsw.Error as error:
            raise pysqlite3.OperationalError(str(error)) from error
        self.rowcount = self._connection.changes()
        return self

    def fetchone(self) -> Any:
        return self._rows.pop(0) if self._rows else None

    def fetchall(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return rows

    def fetchmany(self, size: int = 1) -> list[Any]:
        rows, self._rows = self._rows[:size], self._rows[size:]
        return rows

    def close(self) -> None:
        pass
