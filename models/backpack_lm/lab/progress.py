"""How long work shows that it goes on, and how it is taken up again after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from backpack_lm import strict_json

T = TypeVar("T")


class Watch(Protocol):
    """Gives items on one by one, and shows how many are done of how many, and of what."""

    def __call__(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]: ...


def unwatched(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """A Watch that shows nothing."""
    return iter(items)


class ResumeJournal:
    """Results of finished pieces of work, one JSON line each, so that a stopped run goes on where it was.

    `made_by` is everything that decides the results; a journal of something else is refused with ValueError.
    Without a file nothing is kept. There is none before the first result: work that is refused leaves nothing.
    """

    def __init__(self, file: Path | None, made_by: dict[str, Any]) -> None:
        self.file = file
        self._done: dict[str, Any] = {}
        self._head = head = json.dumps({"made_by": made_by}, sort_keys=True)
        if file is None or not file.exists():
            return
        first, *lines = file.read_text("utf-8").split("\n")
        if not head.startswith(first):
            raise ValueError(f"{file} holds the work of other settings: {first}; give the same to go on, or remove it")
        whole = [line for line in lines if _is_whole(line)]
        self._done = dict(strict_json.parse(line, finite=False) for line in whole)
        partial = file.with_suffix(".writing")
        partial.write_text("".join(f"{line}\n" for line in [head, *whole]), "utf-8")
        partial.rename(file)

    def once(self, key: str, work: Callable[[], T]) -> T:
        """What `work` returned the first time, whether in this run or an earlier one. It must survive JSON."""
        if key not in self._done:
            value = work()
            self._done[key] = json.loads(json.dumps(value))
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as out:
                    line = json.dumps([key, value])
                    out.write(f"{line}\n" if out.tell() else f"{self._head}\n{line}\n")
        found: T = self._done[key]
        return found

    def finish(self) -> None:
        """Remove the file: the work is done and its results are elsewhere."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def _is_whole(line: str) -> bool:
    """Whether a line wasn't cut off while it was written; what was is done again."""
    try:
        strict_json.parse(line, finite=False)
    except ValueError:
        return False
    return True
