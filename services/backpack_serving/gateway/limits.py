"""Rate limits of tenants: requests and tokens a minute, and concurrent requests.

Requests and tokens are token buckets that hold a minute's worth. A request is charged before it runs, for its
prompt and the most tokens that it may generate, and refunded what it didn't use. A bucket that isn't empty may be
overdrawn: later requests are refused until the debt is paid. So no request is too large. Each gateway counts for
itself, in memory.
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

from backpack_serving.auth.tls import modification_time
from backpack_serving.errors import Exhausted, Quota

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0
"""Least seconds between two checks whether the file of limits has changed."""

BUSY_RETRY = 1.0
"""Retry delay after too many concurrent requests; nobody knows when one will end."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A tenant's limits; 0 is none."""

    requests_per_minute: float = 0
    tokens_per_minute: float = 0
    concurrent: int = 0


UNLIMITED = Limit()


class TokenBucket:
    """A token bucket that starts full, fills at `capacity` a minute, and may be in debt."""

    def __init__(self, capacity: float, now: float) -> None:
        self.capacity = self._level = capacity
        self._rate, self._filled_at = capacity / 60, now

    def wait(self, now: float) -> float:
        """Seconds until something may be taken; 0 if it may be taken now."""
        self._level = min(self.capacity, self._level + (now - self._filled_at) * self._rate)
        self._filled_at = now
        needed = min(1.0, self.capacity)
        return max(0.0, (needed - self._level) / self._rate)

    def take(self, amount: float) -> None:
        """Take any amount, or return it if it is negative. Ask `wait` first."""
        self._level -= amount


@dataclass(slots=True)
class TenantBuckets:
    """One tenant's buckets, and how many of its requests run."""

    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    running: int = 0


def _bucket(current: TokenBucket | None, capacity: float, now: float) -> TokenBucket:
    """The current bucket, or a full one if the limit has changed."""
    return current if current and current.capacity == capacity else TokenBucket(capacity, now)


class TenantLimits:
    """The limits of all tenants: `default`, overridden by a TOML file that is reloaded when it changes.

    The file has a table for each tenant: `[harbour]`, then fields of `Limit`. Raises ValueError if the file can't be
    read at start; a later mistake in it is logged, and the limits of before stay.
    """

    def __init__(self, default: Limit, file: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._default, self._file, self._clock = default, file, clock
        self._buckets: dict[str, TenantBuckets] = {}
        self._looked, self._file_changed = clock(), modification_time(file)
        self._own: Mapping[str, Limit] = read_limits(file, default) if file else {}

    @contextmanager
    def request(self, tenant: str) -> Iterator[Callable[[int], None]]:
        """Count a request of a tenant while the block runs; yields a function that takes or returns tokens.

        Raises Exhausted if it is one request too many, or if no tokens are left; the request then still counts.
        """
        limit = self._of(tenant)
        if limit == UNLIMITED:
            yield lambda tokens: None
            return
        buckets = self._buckets.setdefault(tenant, TenantBuckets())
        if limit.concurrent and buckets.running >= limit.concurrent:
            raise _exhausted(tenant, "CONCURRENCY", f"{counted(limit.concurrent, 'request')} at once", BUSY_RETRY)
        if capacity := limit.requests_per_minute:
            buckets.requests = _bucket(buckets.requests, capacity, self._clock())
            if wait := buckets.requests.wait(self._clock()):
                raise _exhausted(tenant, "REQUESTS", f"{counted(capacity, 'request')} a minute", wait)
            buckets.requests.take(1)

        charged: TokenBucket | None = None

        def take(amount: int) -> None:
            nonlocal charged
            if amount > 0:
                capacity = self._of(tenant).tokens_per_minute
                charged = buckets.tokens = _bucket(buckets.tokens, capacity, self._clock()) if capacity else None
                if charged and (wait := charged.wait(self._clock())):
                    raise _exhausted(tenant, "TOKENS", f"{counted(capacity, 'token')} a minute", wait)
            if charged:  # a bucket that new limits have replaced gets the tokens back, and nobody asks it again
                charged.take(amount)

        buckets.running += 1
        try:
            yield take
        finally:
            buckets.running -= 1

    def _of(self, tenant: str) -> Limit:
        self._reload_if_due()
        return self._own.get(tenant, self._default)

    def _reload_if_due(self) -> None:
        if self._file is None or self._clock() - self._looked < LOOK_SECONDS:
            return
        self._looked = self._clock()
        if (changed := modification_time(self._file)) != self._file_changed:
            self._file_changed = changed
            try:
                self._own = read_limits(self._file, self._default)
                log.info("limits read", file=str(self._file), tenants=len(self._own))
            except ValueError as error:
                log.error("limits not read; the ones before hold on", file=str(self._file), reason=str(error))


def read_limits(file: Path, default: Limit) -> dict[str, Limit]:
    """A file's limits by tenant; `default` fills in what a table leaves out. Raises ValueError."""
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


def _exhausted(tenant: str, what: str, limit: str, wait: float) -> Exhausted:
    return Exhausted(
        f"{what}_LIMIT",
        f"tenants/{tenant} has a limit of {limit}; try again in {wait:.1f} s",
        quotas=[Quota(f"tenants/{tenant}", limit)],
        retry_after=wait,
    )
