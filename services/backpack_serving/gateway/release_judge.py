"""Has each new release judged by a replica, and reports what it does to ordinary text to the intervention service."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import structlog
from backpack_lm.patch import release_digest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2, sync_pb2

from backpack_serving import rpc, tasks
from backpack_serving.errors import TOPICS_NOT_READY, ServiceError, Unavailable
from backpack_serving.gateway.releases import ReleaseResolver
from backpack_serving.gateway.routing import Router, Target
from backpack_serving.gateway.wire import write_pin
from backpack_serving.references import Pin, ReleaseRef
from backpack_serving.sync.state import StateView
from backpack_serving.sync.transport import SyncTransport
from backpack_serving.wire import inference as wire
from backpack_serving.wire.references import write_ref

log = structlog.get_logger(__name__)

JUDGED_TOKENS = 2048
"""What judging a release costs a replica: about as many tokens as `backpack_lm.ordinary_text` predicts."""

DELAY = 0.3
"""Seconds before a new release is judged: who made it may ask for its judgement at once, which then is reported."""

JUDGE_SECONDS, REPORT_SECONDS = 30.0, 5.0
AT_ONCE = 4
"""Tenants whose releases are judged side by side: one may have to wait for denominators of topics."""

LOOK_AGAIN = 0.5
"""Seconds after which it is looked at again whether a release waits to be judged."""

MOST_MISSED = 8
"""Releases made since the last one that was seen: of a burst, only the newest are judged."""

MOST_KNOWN = 4096

NOTHING = release_digest([])
"""The digest of the release without revisions, the model unpatched."""


class ReleaseJudge:
    """Judges each release once: of a tenant one at a time, its newest first, tenants in turn.

    Every gateway does so, since none knows of the others; the intervention service keeps the first judgement. A
    release that can't be judged now isn't tried again: channels take it, and the audit trail says that it wasn't.
    """

    def __init__(
        self, transport: SyncTransport, releases: ReleaseResolver, router: Router, stub: object, service_key: str
    ) -> None:
        self._transport, self._releases, self._router = transport, releases, router
        self._stub, self._key = stub, service_key
        self._known: OrderedDict[tuple[str, ReleaseRef], None] = OrderedDict()  # judged, or about to be, oldest first
        self._seen: dict[str, int] = {}
        self._waiting: dict[str, list[int]] = {}  # numbers by tenant, newest last; whose turn it is, first
        self._busy: dict[str, asyncio.Task[None]] = {}  # of tenants whose release is being judged

    async def run(self) -> None:
        """Follow the gateway's view for ever. What it contains at the start is taken for judged."""
        view = self._transport.client.view
        self._seen = {tenant: fresh.release.number for tenant, fresh in view.fresh.items()}
        try:
            while True:
                moved = self._transport.next_view()
                for tenant, numbers in self._new_releases(self._transport.client.view):
                    self._enqueue(tenant, numbers)
                while len(self._busy) < AT_ONCE and (turn := self._whose_turn()):
                    self._busy[turn] = asyncio.create_task(self._judge_next(turn))
                if self._busy:
                    await asyncio.wait(self._busy.values(), timeout=LOOK_AGAIN, return_when=asyncio.FIRST_COMPLETED)
                    continue
                await tasks.wait_at_most(moved, LOOK_AGAIN)
                if moved.is_set():
                    await asyncio.sleep(DELAY)
        finally:
            await tasks.end(*self._busy.values())

    def claim(self, pin: Pin) -> bool:
        """Whether nobody has judged this release yet, or is about to: the caller is, from now on."""
        key = pin.tenant, pin.ref
        if pin.draft or pin.digest == NOTHING or key in self._known:
            return False
        self._known[key] = None
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return True

    def give_up(self, pin: Pin, again: bool = False) -> None:
        """The claimed release wasn't judged; `again`: because its caller left, so it is to be judged all the same."""
        self._known.pop((pin.tenant, pin.ref), None)
        if again:
            self._enqueue(pin.tenant, [pin.release])

    async def report(self, pin: Pin, found: pb.JudgeResponse) -> None:
        """Tell the intervention service. Logs what goes wrong: the judgement itself is right."""
        largest = 1e300  # of a release under which text is all but impossible
        judgement = interventions_pb2.Judgement(
            tokens=found.tokens,
            perplexity_before=found.perplexity_before,
            perplexity_after=min(found.perplexity_after, largest),
        )
        request = sync_pb2.RecordJudgementRequest(tenant=pin.tenant, release=write_ref(pin.ref), judgement=judgement)
        try:
            with rpc.errors():
                call = self._stub.RecordJudgement  # type: ignore[attr-defined]
                await call(request, metadata=rpc.with_key(self._key), timeout=REPORT_SECONDS)
        except ServiceError as error:
            self.give_up(pin)
            log.warning("a judgement can't be reported", tenant=pin.tenant, release=pin.release, error=error.message)

    def _new_releases(self, view: StateView) -> Iterator[tuple[str, Sequence[int]]]:
        """Numbers by tenant. The view has a tenant's newest release only, so those before it are counted."""
        for tenant, fresh in view.fresh.items():
            newest = fresh.release.number
            known = 0 if newest <= MOST_MISSED else newest - 1  # of a tenant that is new, or a gateway that is
            if (last := self._seen.get(tenant, known)) == newest:
                continue
            self._seen[tenant] = newest
            first = max(last + 1, newest - MOST_MISSED + 1) if last < newest else newest  # else it is another epoch
            yield tenant, range(first, newest + 1)

    def _enqueue(self, tenant: str, numbers: Iterable[int]) -> None:
        self._waiting[tenant] = [*self._waiting.get(tenant, ()), *numbers][-MOST_MISSED:]

    def _whose_turn(self) -> str | None:
        return next((tenant for tenant in self._waiting if tenant not in self._busy), None)

    async def _judge_next(self, tenant: str) -> None:
        numbers = self._waiting.pop(tenant)
        number = numbers.pop()
        if numbers:
            self._waiting[tenant] = numbers
        try:
            (pin,) = await self._releases.pin(tenant, [number])
            if self.claim(pin):
                await self._judge_and_report(pin)
        except ServiceError as error:
            log.warning("a release can't be judged", tenant=tenant, release=number, error=error.message)
        except Exception:  # a bug of ours must not go unnoticed
            log.exception("a mistake of ours; going on", tenant=tenant, release=number)
        finally:
            del self._busy[tenant]

    async def _judge_and_report(self, pin: Pin) -> None:
        metadata = (*rpc.with_key(self._key), (wire.PIN, write_pin(pin).SerializeToString()))
        tried: list[Target] = []
        while True:
            try:
                with self._router.lease(JUDGED_TOKENS, tried) as target, rpc.errors():
                    tried.append(target)
                    found = await target.stub.Judge(pb.JudgeRequest(limit=1), metadata=metadata, timeout=JUDGE_SECONDS)
                    break
            except Unavailable as error:
                if len(tried) == 1 and self._router.size > 1 and error.reason != TOPICS_NOT_READY:
                    continue
                self.give_up(pin)
                raise
            except ServiceError:
                self.give_up(pin)
                raise
        await self.report(pin, found)
