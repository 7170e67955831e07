"""What a tenant may ask of a gateway: requests and tokens a minute, and how many requests at once.

Requests and tokens are token buckets that hold a minute's worth. A request is charged before it runs, for its
prompt and all tokens that it may make, and gets back what it didn't use. Whoever has any tokens left may ask for
more than they have: the bucket then is in debt, and the next request waits until that is paid. So no request is
too large. All processes of one gateway count together, in `levels`; each gateway counts for itself.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import structlog
from backpack_lm.counted import counted
from backpack_lm.strict_json import UTF8

from backpack_serving.errors import Exhausted, Quota
from backpack_serving.gateway.shared_buckets import SharedBuckets

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0
"""How often, at most, the file of limits is looked at for changes."""

BUSY_RETRY = 1.0
"""Seconds to wait before another try when too many requests run; when one will end isn't known."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A tenant's limits; 0 is none."""

    requests_per_minute: float = 0
    tokens_per_minute: float = 0
    concurrent: int = 0


UNLIMITED = Limit()


class Bucket:
    """A token bucket that fills at `rate` a second up to `capacity`, and may be in debt.

    It lives in `numbers`: its capacity, its level, and when that was so. With a new capacity it is full.
    """

    def __init__(self, per_minute: float, numbers: memoryview[float]) -> None:
        self.capacity, self.rate = per_minute, per_minute / 60
        self._numbers = numbers

    @property
    def known(self) -> bool:
        """Whether the numbers are those of a bucket of this capacity."""
        return self._numbers[0] == self.capacity

    def wait(self, now: float) -> float:
        """Seconds until something may be taken; 0 if it may be now."""
        _, level, at = self._numbers
        level = min(self.capacity, level + (now - at) * self.rate) if self.known else self.capacity
        self._numbers[0], self._numbers[1], self._numbers[2] = self.capacity, level, now
        needed = min(1.0, self.capacity)
        return max(0.0, (needed - level) / self.rate)

    def take(self, amount: float) -> None:
        """Take any amount, or give back if it is negative. Ask `wait` first."""
        self._numbers[1] -= amount


class TenantLimits:
    """The limits of all tenants: `default`, and those of a file that is read again when it changes.

    The file is TOML, a table for each tenant: `[harbour]`, then any of Limit's names. Raises ValueError if it
    can't be read at first; a later mistake in it is logged, and what held before holds on.
    `levels` is what tenants have left of them.
    """

    def __init__(
        self,
        default: Limit,
        file: Path | None = None,
        levels: SharedBuckets | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._default, self._file, self._clock = default, file, clock
        self._levels = levels or SharedBuckets()
        self._looked, self._file_changed = clock(), _file_changed(file)
        self._own: Mapping[str, Limit] = read_limits(file, default) if file else {}

    @contextmanager
    def request(self, tenant: str) -> Iterator[Callable[[int], None]]:
        """A request of a tenant, for as long as the block runs; what it gives takes tokens, or gives back some.

        Raises Exhausted if it is one too many, or if there are no tokens; the request then counts nevertheless.
        """
        limit = self._of(tenant)
        if limit == UNLIMITED:
            yield lambda tokens: None
            return
        with self._levels.row(tenant) as row:
            if limit.concurrent and row.running >= limit.concurrent:
                raise _exhausted(tenant, "CONCURRENCY", f"{counted(limit.concurrent, 'request')} at once", BUSY_RETRY)
            if limit.requests_per_minute:
                requests = Bucket(limit.requests_per_minute, row.requests)
                if wait := requests.wait(self._clock()):
                    raise _exhausted(tenant, "REQUESTS", f"{counted(requests.capacity, 'request')} a minute", wait)
                requests.take(1)
            row.run(1)

        charged = 0.0  # the capacity of the bucket that was

        def take(amount: int) -> None:
            nonlocal charged
            if amount > 0:
                charged = self._of(tenant).tokens_per_minute
            if not charged:
                return
            with self._levels.row(tenant) as row:
                tokens = Bucket(charged, row.tokens)
                if amount <= 0 and not tokens.known:
                    return  # new limits hold since: their bucket was never charged for this
                wait = tokens.wait(self._clock())
                if amount > 0 and wait:
                    raise _exhausted(tenant, "TOKENS", f"{counted(tokens.capacity, 'token')} a minute", wait)
                tokens.take(amount)

        try:
            yield take
        finally:
            with self._levels.row(tenant) as row:
                row.run(-1)

    def _of(self, tenant: str) -> Limit:
        self._reload_if_due()
        return self._own.get(tenant, self._default)

    def _reload_if_due(self) -> None:
        if self._file is None or self._clock() - self._looked < LOOK_SECONDS:
            return
        self._looked = self._clock()
        if (changed := _file_changed(self._file)) != self._file_changed:
            self._file_changed = changed
            try:
                self._own = read_limits(self._file, self._default)
                log.info("limits read", file=str(self._file), tenants=len(self._own))
            except ValueError as error:
                log.error("limits not read; the ones before hold on", file=str(self._file), reason=str(error))


def read_limits(file: Path, default: Limit) -> dict[str, Limit]:
    """A file's limits by tenant; what a table doesn't say is as in `default`. Raises ValueError."""
    names = {f.name for f in fields(Limit)}
    found = {}
    try:
        tables = tomllib.loads(file.read_text(UTF8))
    except OSError as error:
        raise ValueError(f"BACKPACK_LIMITS_FILE={file}: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"BACKPACK_LIMITS_FILE={file}: no TOML: its brackets nest too deeply") from None
    except ValueError as error:
        raise ValueError(f"BACKPACK_LIMITS_FILE={file}: no TOML: {error}") from None
    for tenant, values in tables.items():
        if not isinstance(values, dict):
            raise ValueError(f"{file}: {tenant!r} is no table; write [{tenant}], and the limits under it")
        for name, value in values.items():
            if name not in names:
                raise ValueError(f"{file}: [{tenant}] has {name!r}; there are {', '.join(sorted(names))}")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf"):
                raise ValueError(f"{file}: [{tenant}] {name} = {value!r}; a number, 0 for none")
        known = {name: getattr(default, name) for name in names}
        found[tenant] = Limit(**{**known, **values})
    return found


def _file_changed(file: Path | None) -> int:
    """When a file changed last; 0 if it isn't there."""
    try:
        return file.stat().st_mtime_ns if file else 0
    except OSError:
        return 0


def _exhausted(tenant: str, what: str, limit: str, wait: float) -> Exhausted:
    return Exhausted(
        f"{what}_LIMIT",
        f"tenants/{tenant} has a limit of {limit}; try again in {wait:.1f} s",
        quotas=[Quota(f"tenants/{tenant}", limit)],
        retry_after=wait,
    )
