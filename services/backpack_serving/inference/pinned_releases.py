"""The compiled releases that the gateway pinned a request to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import structlog
from backpack_lm.overlay import Overlay
from backpack_lm.patch import PatchError
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.errors import PreconditionFailed, ServiceError
from backpack_serving.inference.release_cache import ReleaseCache
from backpack_serving.observability.metrics import ReplicaMetrics

log = structlog.get_logger(__name__)


class PinnedReleases:
    """Gets pinned releases from the cache: exactly these, or an error; never another release, never none."""

    def __init__(self, cache: ReleaseCache, metrics: ReplicaMetrics) -> None:
        self._cache, self._seconds = cache, metrics.release_seconds

    @asynccontextmanager
    async def use(self, pins: Sequence[pb.Pin], time_left: float | None) -> AsyncIterator[list[Overlay]]:
        """The overlays of these pins, in their order, kept compiled while the block runs.

        Raises the first refusal among them, before the caller's `time_left` in seconds (None: no limit) is over.
        """
        patience = None if time_left is None else max(0.0, time_left - min(0.5, time_left / 10))
        async with AsyncExitStack() as stack:

            async def get(pin: pb.Pin) -> Overlay | ServiceError | PatchError:
                try:
                    using = self._cache.use(pin.tenant, pin.release_digest, patience)
                    return await stack.enter_async_context(using)
                except (ServiceError, PatchError) as error:
                    log.warning("release refused", tenant=pin.tenant, digest=pin.release_digest, error=str(error))
                    return error

            with self._seconds.time():
                # One alone without a task: if it is compiled, the engine has its request before all else.
                found = await asyncio.gather(*map(get, pins)) if len(pins) > 1 else [await get(pins[0])]
            overlays: list[Overlay] = []
            for pin, one in zip(pins, found, strict=True):
                if isinstance(one, PatchError):
                    raise _unservable(one, pin)
                if isinstance(one, ServiceError):
                    raise one
                overlays.append(one)
            yield overlays


def _unservable(error: PatchError, pin: pb.Pin) -> ServiceError:
    """A release that was stored but can't be applied here is no mistake of the caller's request."""
    return PreconditionFailed(error.violations[0].reason, f"release {pin.release} can't be served: {error}")
