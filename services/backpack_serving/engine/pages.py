"""Pages of the caches: who uses which, and what each still holds. Arithmetic only.

A page follows the page of the positions before its own, so pages are trees, one for each scope: sequences that begin
alike use the same pages as far as these are full. What a sequence had computed stays when it leaves, until its pages
are needed: those unused longest go first, and none before those that follow it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from backpack_serving.engine.sequence import Page, Prefix, Sequence

WORTH_WAITING = 16
"""Tokens by which a beginning that is being computed must be longer than one that is there."""


class PagePool:
    """`count` pages of `size` positions."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))
        self._idle: OrderedDict[Page, None] = OrderedDict()  # that nobody uses: followers first, then unused longest
        self._next: dict[tuple[Page | str, int], list[Page]] = {}

    @property
    def available(self) -> int:
        """Pages that nobody uses."""
        return len(self._free) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Pages that so many tokens fill."""
        return -(-tokens // self.size)

    def find_prefix(self, scope: str, sequence: Sequence) -> Prefix | None:
        """The longest beginning of a sequence that pages of a scope hold; or one that another sequence is about to
        compute, if that is worth waiting for.

        At least one token is left to compute: what comes after it has to be predicted.
        """
        best, worth = None, 0
        limit = len(sequence.tokens) - 1
        paths: list[tuple[Page | str, tuple[Page, ...], Sequence | None]] = [(scope, (), None)]
        while paths:
            last, before, awaited = paths.pop()
            start = len(before) * self.size
            if start >= limit:
                continue
            for page in self._next.get((last, sequence.tokens[start]), ()):
                if awaited and page.owner is not awaited:
                    continue
                there, coming = page.held(self.size)
                length = _common(coming, sequence.tokens[start : start + self.size], limit - start)
                ready = min(length, len(there))
                pages, owner = (*before, page), page.owner if length > ready else None
                for prefix in (Prefix(pages, start + ready, None), Prefix(pages, start + length, owner)):
                    value = prefix.length if prefix.ready else prefix.length - WORTH_WAITING
                    if prefix.length > start and value > worth:
                        best, worth = prefix, value
                if length == self.size:
                    paths.append((page, pages, owner))
        return best

    def begin(self, scope: str, sequence: Sequence, spare: int) -> bool:
        """Give a sequence pages for its tokens, those of its longest known beginning first; it becomes the sequence's
        `pending_prefix`. False if fewer than `spare` pages would be left.
        """
        prefix = self.find_prefix(scope, sequence)
        if prefix and not self._fits(sequence, prefix, spare):
            prefix = prefix.whole_pages(self.size)  # the page to copy from may be the one that is needed
        if not self._fits(sequence, prefix, spare):
            return False
        sequence.pending_prefix = prefix
        for page in prefix.pages if prefix else ():
            page.users += 1
            self._idle.pop(page, None)
        if prefix:
            sequence.pages = list(prefix.pages[: prefix.length // self.size])
        last: Page | str = sequence.pages[-1] if sequence.pages else scope
        while len(sequence.pages) < self.needed(len(sequence.tokens)):
            last = self._append(sequence, last)
        return True

    def grow(self, sequence: Sequence) -> None:
        """One page more. Ask `available` first."""
        self._append(sequence, sequence.pages[-1])

    def copied(self, sequence: Sequence) -> None:
        """The page that a sequence's pending prefix ends in is no longer needed."""
        prefix, sequence.pending_prefix = sequence.pending_prefix, None
        if prefix and (donor := prefix.donor(self.size)):
            self._leave(donor)

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's pages back. What it has computed stays until they are needed."""
        self.copied(sequence)
        for page in reversed(sequence.pages):
            if page.owner is sequence:
                page.tokens, _ = page.held(self.size)
                page.owner = None
            self._leave(page)
        sequence.pages = []

    def _fits(self, sequence: Sequence, prefix: Prefix | None, spare: int) -> bool:
        shared, idle = 0, 0
        if prefix:
            shared, idle = prefix.length // self.size, sum(not page.users for page in prefix.pages)
        return self.needed(len(sequence.tokens)) - shared + spare <= self.available - idle

    def _append(self, sequence: Sequence, last: Page | str) -> Page:
        if not self._free:
            self._forget(next(iter(self._idle)))
        start = len(sequence.pages) * self.size
        page = Page(self._free.pop(), (last, sequence.tokens[start]), start, sequence)
        self._next.setdefault(page.key, []).append(page)
        sequence.pages.append(page)
        return page

    def _leave(self, page: Page) -> None:
        page.users -= 1
        if not page.users:
            self._idle[page] = None
            if not page.tokens:
                self._forget(page)

    def _forget(self, page: Page) -> None:
        del self._idle[page]
        self._next[page.key].remove(page)
        if not self._next[page.key]:
            del self._next[page.key]
        self._free.append(page.number)

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Raise AssertionError unless every page is free, idle or in use, once, and used by these sequences alone."""
        users: Counter[Page] = Counter()
        for sequence in running:
            assert len(sequence.tokens) <= len(sequence.pages) * self.size + 1, "a page is missing"
            users.update(sequence.pages)
            if sequence.pending_prefix and (donor := sequence.pending_prefix.donor(self.size)):
                users[donor] += 1
        pages = {page for following in self._next.values() for page in following}
        assert {page: page.users for page in pages if page.users} == users, "users of pages"
        assert {page for page in pages if not page.users} == set(self._idle), "idle pages"
        numbers = [*self._free, *(page.number for page in pages)]
        assert sorted(numbers) == list(range(self.count)), "pages were lost"
        seen: set[Page] = set()
        for page in self._idle:
            seen.add(page)
            assert page.key[0] not in seen, "a page goes before one that follows it"
        for page in pages:
            assert isinstance(page.key[0], str) or page.key[0] in pages, "a page follows one that is gone"


def _common(a: list[int], b: list[int], limit: int) -> int:
    """Length of the longest common beginning, at most `limit`; slices are compared at the speed of C."""
    low, high = 0, min(len(a), len(b), limit)
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
