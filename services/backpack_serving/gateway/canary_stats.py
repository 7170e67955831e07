"""Counts the requests that ran under a canary, and their errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from backpack_serving.errors import DataLoss, Internal, NotFound, PreconditionFailed, ServiceError
from backpack_serving.references import CanaryTally, Pin, Refusal
from backpack_serving.sync.state import Stageable, StateView

RELEASE_ERRORS = (DataLoss, Internal, NotFound, PreconditionFailed)
"""Errors of a replica that count against the canary's release."""


class CanaryStats:
    """The delegate of a gateway's sync client. A gateway has nothing to stage, so it refuses nothing."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str], CanaryTally] = {}
        self._canaries: frozenset[tuple[str, str, str]] = frozenset()

    @contextmanager
    def request(self, pin: Pin) -> Iterator[None]:
        """Count a request to a replica, if it runs under a canary alone: what a draft does isn't the canary's fault."""
        if not pin.canary or pin.draft:
            yield
            return
        try:
            yield
        except RELEASE_ERRORS as error:
            self._count(pin, error)
            raise
        except ServiceError:
            raise  # not the release's fault
        else:
            self._count(pin, None)

    def _count(self, pin: Pin, error: ServiceError | None) -> None:
        key = pin.tenant, pin.channel, pin.digest
        if key not in self._canaries:
            return  # the canary ended meanwhile; counting would harm a later canary of this release
        old = self._counts.get(key) or CanaryTally(*key, 0, 0)
        non_finite = error is not None and error.reason == "NON_FINITE"
        self._counts[key] = replace(
            old,
            requests=old.requests + 1,
            errors=old.errors + (error is not None),
            non_finite=old.non_finite + non_finite,
        )

    # ---- backpack_serving.sync.transport.SyncDelegate

    async def stage(self, work: tuple[Stageable, ...]) -> tuple[Refusal, ...]:
        return ()

    def swapped(self, view: StateView) -> None:
        canaries = ((*c.key, c.canary.release.digest) for c in view.channels.values() if c.canary)
        self._canaries = frozenset(canaries)
        self._counts = {key: tally for key, tally in self._counts.items() if key in self._canaries}

    def resident(self) -> frozenset[str]:
        return frozenset()

    def tallies(self) -> tuple[CanaryTally, ...]:
        return tuple(self._counts.values())
