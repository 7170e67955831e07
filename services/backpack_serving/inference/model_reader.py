"""Scores, explanations, comparisons, and what is asked about words: passes beside the engine, one at a time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import NamedTuple, TypeVar

from backpack_lm.attribution import Attribution, SenseReading, Terms
from backpack_lm.compare import Distribution
from backpack_lm.ordinary_text import OrdinaryText, SideEffects
from backpack_lm.overlay import Overlay
from backpack_lm.sense_map import MapReading
from backpack_lm.sense_search import RankedCell
from backpack_lm.word_uses import ParagraphedText, UseReading, spread

from backpack_serving import tasks
from backpack_serving.errors import Internal, PreconditionFailed
from backpack_serving.inference.fair_lock import FairLock
from backpack_serving.inference.pinned_releases import Pinned
from backpack_serving.inference.served_model import Ranked, ServedModel
from backpack_serving.wire.compare import ComparisonQuery
from backpack_serving.wire.search import SearchPage, SearchQuery
from backpack_serving.wire.words import MapQuery

T = TypeVar("T")

COMPARED_AT_ONCE = 16
"""Releases of a comparison that are kept compiled at once, and read before another request gets its turn."""


class UseReadings(NamedTuple):
    """Some of a word's `occurrences` in a text of so many tokens."""

    uses: list[UseReading]
    occurrences: int
    tokens: int


CompiledReleases = Callable[[Sequence[Pinned]], AbstractAsyncContextManager[list[Overlay]]]


class ModelReader:
    """Reads the model under given releases. Raises Internal where a release makes it predict no finite numbers, but for
    the words that it forbids."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._lock = FairLock()
        self._text: OrdinaryText | None = None  # read when a release is first judged
        self._paragraphs: ParagraphedText | None = None  # read when uses of a word are first asked for

    async def score(self, tenant: str, ids: tuple[int, ...], overlay: Overlay) -> list[float]:
        """log p of each token but the first, of two at least."""
        logs = await self._run_in_turn(tenant, self._served.score, ids, overlay)
        _check_numbers(overlay, zip(ids[1:], logs, strict=True))
        return logs

    async def rank(self, tenant: str, ids: tuple[int, ...], overlay: Overlay, top: int) -> Ranked:
        """log p of each token but the first, of two at least, and the `top` likeliest in its place, if any."""
        if not top:
            logs = await self.score(tenant, ids, overlay)
            return Ranked(logs, [[] for _ in logs])
        ranked = await self._run_in_turn(tenant, self._served.rank, ids, overlay, top)
        _check_numbers(overlay, zip(ids[1:], ranked.logs, strict=True))
        return ranked

    async def explain(self, tenant: str, ids: tuple[int, ...], overlay: Overlay, target: int | None) -> Attribution:
        """The terms of the logit of `target`, or of the likeliest token, after `ids`."""
        found = await self._run_in_turn(tenant, self._served.explain, ids, overlay, target)
        _check_numbers(overlay, ((found.target, value) for value in (found.terms.logit, found.log_probability)))
        return found

    async def explain_text(self, tenant: str, ids: Sequence[int], overlay: Overlay, start: int) -> list[Terms]:
        """The terms of the logit of each token from position `start` on."""
        return await self._run_in_turn(tenant, self._served.explain_text, ids, overlay, start)

    async def compare(
        self, query: ComparisonQuery, pinned: Sequence[Pinned], compiled: CompiledReleases
    ) -> dict[str, list[float] | Distribution]:
        """The answer under each pinned release, by its digest. All are of one tenant."""
        tenant = pinned[0].pin.tenant
        text = await self._run_in_turn(tenant, self._served.compare, query)
        distinct = list({one.digest: one for one in pinned}.values())
        answers: dict[str, list[float] | Distribution] = {}
        for at in range(0, len(distinct), COMPARED_AT_ONCE):
            async with compiled(distinct[at : at + COMPARED_AT_ONCE]) as overlays:
                found = await self._run_in_turn(tenant, text.read, overlays)
                for overlay, answer in zip(overlays, found, strict=True):
                    if isinstance(answer, list):
                        _check_numbers(overlay, zip(query.ids[1:], answer, strict=True))
                    else:
                        _check_numbers(overlay, (*answer.top, *answer.targets))
                    answers[overlay.digest] = answer
        return answers

    async def senses(
        self, tenant: str, token: int, overlay: Overlay, limit: int, neighbours: int
    ) -> list[SenseReading]:
        """Every sense of a token, with its `limit` best and worst predictions and `neighbours` nearest words."""
        return await self._run_in_turn(tenant, self._served.senses, token, overlay, limit, neighbours)

    async def judge(self, tenant: str, overlay: Overlay, limit: int) -> SideEffects:
        """What a release does to the model's ordinary text, each excerpt of which is a turn of its own. Raises
        PreconditionFailed if the model has none.
        """
        if self._text is None:
            self._text = await self._run_in_turn(tenant, self._served.ordinary_text)
        text = self._text
        read = [await self._run_in_turn(tenant, text.read, number, overlay) for number in range(len(text))]
        found = await self._run_in_turn(tenant, text.effects, read, limit)
        if math.isnan(found.after):  # the model predicts no numbers: nothing is worse
            return replace(found, after=math.inf, moved=())
        return found

    async def map_sense(self, tenant: str, query: MapQuery, overlay: Overlay) -> MapReading:
        """Where one sense of many words lies."""
        try:
            return await self._run_in_turn(tenant, self._served.map_sense, query, overlay)
        except ArithmeticError:
            raise Internal("NON_FINITE", "the release makes senses that no map can hold") from None

    async def uses(self, tenant: str, token: int, overlay: Overlay, limit: int) -> UseReadings:
        """At most `limit` uses of a token in the model's held-out text, each a turn of its own. Raises
        PreconditionFailed if the model has none.
        """
        if self._paragraphs is None:
            self._paragraphs = await self._run_in_turn(tenant, self._served.paragraphs)
        text = self._paragraphs
        places = await self._run_in_turn(tenant, text.places, token)
        uses = [await self._run_in_turn(tenant, self._served.use, text, p, overlay) for p in spread(places, limit)]
        if not all(bool(use.contributions.isfinite().all()) for use in uses):
            raise Internal("NON_FINITE", "the release makes senses that no contribution can hold")
        return UseReadings(uses, len(places), len(text))

    async def search(self, tenant: str, query: SearchQuery, page: SearchPage, overlay: Overlay) -> list[RankedCell]:
        """A page of the senses that a query asks for. Each prompt is a turn of its own, and so is the page.

        Raises PreconditionFailed for an order by use of a model without counts of its tokens.
        """
        if query.by_use and self._served.frequencies is None:
            message = (
                "this model has no counts of its tokens, so nothing is known of their use; order by score, or have "
                "`backpack model count FOLDER TEXT…` run on its folder and the replicas started again"
            )
            raise PreconditionFailed("NO_TOKEN_COUNTS", message)
        search = await self._run_in_turn(tenant, self._served.search, query, overlay)
        for prompt in query.prompts:
            await self._run_in_turn(tenant, search.read, prompt)
        cells = await self._run_in_turn(tenant, search.cells, page.start, page.size, query.by_use)
        if not all(math.isfinite(cell.score) and math.isfinite(cell.contribution or 0.0) for cell in cells):
            raise Internal("NON_FINITE", "the release makes senses that no score can hold")
        return cells

    async def _run_in_turn(self, tenant: str, work: Callable[..., T], *arguments: object) -> T:
        """Run this in a thread when the tenant has its turn.

        The lock is kept until the thread ends, also if the caller is cancelled: a thread can't be stopped, and
        several would take the engine's cores.
        """
        async with self._lock.acquire(tenant):
            return await tasks.finish(asyncio.to_thread(work, *arguments))


def _check_numbers(overlay: Overlay, logs: Iterable[tuple[int, float]]) -> None:
    """Of tokens: each finite, or −∞ if the release forbids the token."""
    for token, value in logs:
        if not math.isfinite(value) and not value == overlay.bias_of(token) == -math.inf:
            raise Internal("NON_FINITE", "the release makes the model predict no numbers")
