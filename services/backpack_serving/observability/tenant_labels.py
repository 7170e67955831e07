"""Which tenants have a metrics label of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable


class TenantLabels:
    """The busiest `limit` tenants are labelled by name; all others are `other`.

    A newcomer takes the place of the least busy one when it has more than twice its requests; `dropped` is told
    whose label is gone. Halving all tallies now and then forgets the past.
    """

    OTHER = "other"

    def __init__(self, limit: int, dropped: Callable[[str], None], forget_after: int = 10_000) -> None:
        self._limit, self._dropped, self._forget_after = limit, dropped, forget_after
        self._tally: Counter[str] = Counter()
        self._labelled: set[str] = set()
        self._since = 0

    def label(self, tenant: str) -> str:
        """A tenant's label now."""
        return tenant if tenant in self._labelled else self.OTHER

    def count(self, tenant: str) -> str:
        """Count one more request of a tenant; the label that it has then."""
        self._tally[tenant] += 1
        self._decay()
        if tenant not in self._labelled and self._limit:
            if len(self._labelled) < self._limit:
                self._labelled.add(tenant)
            else:
                least = min(self._labelled, key=self._tally.__getitem__)
                if self._tally[tenant] > 2 * self._tally[least]:
                    self._labelled.remove(least)
                    self._labelled.add(tenant)
                    self._dropped(least)
        return self.label(tenant)

    def _decay(self) -> None:
        self._since += 1
        if self._since >= self._forget_after:
            self._since = 0
            self._tally = Counter({name: n // 2 for name, n in self._tally.items() if n > 1})
