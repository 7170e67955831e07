"""What a tenant may ask of this gateway: requests and tokens a minute, and how many requests at once.

Requests and tokens are token buckets that hold a minute's worth. A request is charged before it runs, for its
prompt and all tokens that it may make, and gets back what it didn't use. Whoever has any tokens left may ask for
more than they have: the bucket then is in debt, and the next request waits until that is paid. So no request is
too large. Each gateway process counts for itself.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import structlog

from backpack_serving.errors import Exhausted, Quota

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


class Bucket:
    """A token bucket that fills at `rate` a second up to `capacity`, and may be in debt."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.capacity, self.rate = per_minute, per_minute / 60
        self._level, self._at = per_minute, now

    def wait(self, now: float) -> float:
        """Seconds until something may be taken; 0 if it may be now."""
        self._level = min(self.capacity, self._level + (now - self._at) * self.rate)
        self._at = now
        needed = min(1.0, self.capacity)
        return max(0.0, (needed - self._level) / self.rate)

    def take(self, amount: float) -> None:
        """Take any amount, or give back if it is negative. Ask `wait` first."""
        self._level -= amount


@dataclass(slots=True)
class _Tenant:
    limit: Limit
    requests: Bucket | None
    tokens: Bucket | None
    running: int = 0

    @classmethod
    def new(cls, limit: Limit, now: float) -> _Tenant:
        def bucket(per_minute: float) -> Bucket | None:
            return Bucket(per_minute, now) if per_minute else None

        return cls(limit, bucket(limit.requests_per_minute), bucket(limit.tokens_per_minute))


class Limits:
    """The limits of all tenants: `default`, and those of a file that is read again when it changes.

    The file is TOML, a table for each tenant: `[harbour]`, then any of Limit's names. Raises OSError or ValueError
    if it can't be read at first; a later mistake in it is logged, and what held before holds on.
    """

    def __init__(
        self, default: Limit, file: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._default, self._file, self._clock = default, file, clock
        self._tenants: dict[str, _Tenant] = {}
        self._looked, self._changed = clock(), _changed(file)
        self._own: Mapping[str, Limit] = read_limits(file, default) if file else {}

    @contextmanager
    def request(self, tenant: str) -> Iterator[Callable[[int], None]]:
        """A request of a tenant, for as long as the block runs; what it gives takes tokens, or gives back some.

        Raises Exhausted if it is one too many, or if there are no tokens; the request then counts nevertheless.
        """
        state, now = self._of(tenant), self._clock()
        if state.limit.concurrent and state.running >= state.limit.concurrent:
            raise _exhausted(tenant, "CONCURRENCY", f"{state.limit.concurrent} requests at once", BUSY_RETRY)
        if state.requests:
            if wait := state.requests.wait(now):
                raise _exhausted(tenant, "REQUESTS", f"{state.requests.capacity:g} requests a minute", wait)
            state.requests.take(1)

        def take(tokens: int) -> None:
            if state.tokens:
                if tokens > 0 and (wait := state.tokens.wait(self._clock())):
                    raise _exhausted(tenant, "TOKENS", f"{state.tokens.capacity:g} tokens a minute", wait)
                state.tokens.take(tokens)

        state.running += 1
        try:
            yield take
        finally:
            state.running -= 1

    def _of(self, tenant: str) -> _Tenant:
        self._look()
        limit = self._own.get(tenant, self._default)
        state = self._tenants.get(tenant)
        if state is None:
            state = self._tenants[tenant] = _Tenant.new(limit, self._clock())
        elif state.limit != limit:
            new = _Tenant.new(limit, self._clock())
            state.limit, state.requests, state.tokens = new.limit, new.requests, new.tokens
        return state

    def _look(self) -> None:
        if self._file is None or self._clock() - self._looked < LOOK_SECONDS:
            return
        self._looked = self._clock()
        if (changed := _changed(self._file)) != self._changed:
            self._changed = changed
            try:
                self._own = read_limits(self._file, self._default)
                log.info("limits read", file=str(self._file), tenants=len(self._own))
            except (OSError, ValueError) as error:
                log.error("limits not read; the ones before hold on", file=str(self._file), reason=str(error))


def read_limits(file: Path, default: Limit) -> dict[str, Limit]:
    """A file's limits by tenant; what a table doesn't say is as in `default`. Raises OSError or ValueError."""
    names = {f.name for f in fields(Limit)}
    found = {}
    for tenant, values in tomllib.loads(file.read_text("utf-8")).items():
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


def _changed(file: Path | None) -> int:
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
