"""What is read beside the engine is read in turns, so that a long request keeps nobody waiting for all of it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from backpack_lm.sense_search import RankedCell
from backpack_serving.inference.model_reader import ModelReader
from backpack_serving.wire.search import SearchPage, SearchQuery


class Search:
    """Notes what is done for a tenant, whose words are its name."""

    def __init__(self, tenant: int, done: list[str]) -> None:
        self._tenant, self._done = tenant, done

    def read(self, prompt: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self._done.append(f"{self._tenant} reads {prompt[0]}")

    def cells(self, start: int, count: int, by_use: bool) -> list[RankedCell]:
        assert threading.current_thread() is not threading.main_thread()
        self._done.append(f"{self._tenant} ranks")
        return [RankedCell(0, 0, 1.0, None, False)]


class Served:
    frequencies = None

    def __init__(self) -> None:
        self.done: list[str] = []

    def search(self, query: SearchQuery, overlay: Any) -> Search:
        return Search(query.words[0], self.done)


async def test_each_prompt_of_a_search_is_a_turn_in_a_thread() -> None:
    served: Any = Served()
    reader, nothing, page = ModelReader(served), Any, SearchPage(0, 1)
    long, short = (SearchQuery((who,), (), "RAISE", False, tuple((n,) for n in range(who))) for who in (4, 1))
    await asyncio.gather(
        reader.search("one", long, page, nothing),  # type: ignore[arg-type]
        reader.search("two", short, page, nothing),  # type: ignore[arg-type]
    )
    assert sorted(served.done) == sorted(["1 reads 0", "1 ranks", *(f"4 reads {n}" for n in range(4)), "4 ranks"])
    assert served.done.index("1 ranks") < served.done.index("4 reads 3"), "it didn't wait for all four"
