"""How long work shows that it goes on, and how it is taken up again after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Watch(Protocol):
    """Gives items on one by one, and shows how many are done of how many, and of what."""

    def __call__(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]: ...


def unwatched(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """A Watch that shows nothing."""
    return iter(items)


class Journal:
    """Results of finished pieces of work, one JSON line each, so that a stopped run goes on where it was.

    `made_by` is everything that decides the results; a journal of something else is refused with ValueError.
    Without a file nothing is kept.
    """

    def __init__(self, file: Path | None, made_by: dict[str, Any]) -> None:
        self.file = file
        self._done: dict[str, Any] = {}
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"made_by": made_by}, sort_keys=True)
        if file.exists() and (lines := file.read_text("utf-8").splitlines()):
            if lines[0] != head:
                raise ValueError(
                    f"{file} holds the work of other settings: {lines[0]}; give the same to go on, or remove it"
                )
            # What was cut off while it was written is done again.
            whole = [line for line in lines[1:] if line.endswith("]")]
            self._done = dict(map(json.loads, whole))
            file.write_text("\n".join([head, *whole]) + "\n", "utf-8")
        else:
            file.write_text(head + "\n", "utf-8")

    def once(self, key: str, work: Callable[[], T]) -> T:
        """What `work` returned the first time, whether in this run or an earlier one. It must survive JSON."""
        if key not in self._done:
            value = work()
            self._done[key] = json.loads(json.dumps(value))
            if self.file is not None:
                with self.file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps([key, value]) + "\n")
        found: T = self._done[key]
        return found

    def finish(self) -> None:
        """Remove the file: the work is done and its results are elsewhere."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
