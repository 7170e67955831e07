"""The compiled releases that the gateway pinned a request to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog
from backpack_lm.overlay import Overlay
from backpack_lm.patch import PatchError, RevisionContent
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.errors import PreconditionFailed, ServiceError, from_patch_error
from backpack_serving.inference.release_cache import ReleaseCache, WantedRelease
from backpack_serving.observability.metrics import ReplicaMetrics

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pinned:
    """The release that the gateway pinned a request to, and the draft that the request adds."""

    pin: pb.Pin
    draft: RevisionContent | None = None

    @property
    def digest(self) -> str:
        return WantedRelease(self.pin.release_digest, self.draft).digest


class PinnedReleases:
    """Gets pinned releases from the cache: exactly these, or an error; never another release, never none."""

    def __init__(self, cache: ReleaseCache, metrics: ReplicaMetrics) -> None:
        self._cache, self._seconds = cache, metrics.release_seconds

    @asynccontextmanager
    async def use(self, pinned: Sequence[Pinned], time_left: float | None) -> AsyncIterator[list[Overlay]]:
        """The overlays of these, in their order, kept compiled while the block runs.

        Raises the first refusal among them, before the caller's `time_left` in seconds (None: no limit) is over.
        """
        patience = None if time_left is None else max(0.0, time_left - min(0.5, time_left / 10))
        async with AsyncExitStack() as stack:

            async def get(one: Pinned) -> Overlay | ServiceError | PatchError:
                try:
                    using = self._cache.use(one.pin.tenant, one.pin.release_digest, patience, one.draft)
                    return await stack.enter_async_context(using)
                except (ServiceError, PatchError) as error:
                    log.warning("release refused", tenant=one.pin.tenant, digest=one.digest, error=str(error))
                    return error

            with self._seconds.time():
                # One alone without a task: if it is compiled, the engine has its request before all else.
                found = await asyncio.gather(*map(get, pinned)) if len(pinned) > 1 else [await get(pinned[0])]
            overlays: list[Overlay] = []
            for one, overlay in zip(pinned, found, strict=True):
                if isinstance(overlay, PatchError):
                    alone = await get(Pinned(one.pin)) if one.draft else None
                    if isinstance(alone, PatchError):  # it isn't the draft's fault
                        raise _unservable(alone, Pinned(one.pin))
                    raise _unservable(overlay, one)
                if isinstance(overlay, ServiceError):
                    raise overlay
                overlays.append(overlay)
            yield overlays


def _unservable(error: PatchError, one: Pinned) -> ServiceError:
    """A release that was stored but can't be applied here is no mistake of the caller's request; a draft is."""
    if one.draft:
        return from_patch_error(error, "draft.")
    return PreconditionFailed(error.violations[0].reason, f"release {one.pin.release} can't be served: {error}")
