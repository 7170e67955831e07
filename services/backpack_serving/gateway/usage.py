"""Measures requests, and charges their tokens to tenants' limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from backpack_serving import rpc
from backpack_serving.errors import Expired
from backpack_serving.gateway.limits import TenantLimits
from backpack_serving.observability.metrics import GatewayMetrics


class RequestUsage:
    """Times and tokens of one request."""

    def __init__(self, metrics: GatewayMetrics, tenant: str, take: Callable[[int], None]) -> None:
        self._metrics, self.tenant, self._take = metrics, tenant, take
        self._arrived = perf_counter()
        self._sent = self._accepted = self._first = self._latest = 0.0
        self._first_tokens = self._charged = self._prompt = self._work = 0
        self._sent_to_replica = self._abandoned = False
        self.generated = 0

    def charge(self, prompt: int, new: int = 0, work: int = 0) -> None:
        """Charge the prompt, the most tokens that may be generated, and the tokens that other work counts as, which
        metrics don't have. Raises Exhausted if no tokens are left.
        """
        self._take(prompt + new + work)
        self._prompt, self._work, self._charged = prompt, work, prompt + new + work

    def sending(self, attempt: int) -> None:
        """Note that a replica is about to be called; `attempt` counts from 0."""
        self._sent, self._sent_to_replica = perf_counter(), True
        if attempt:
            self._metrics.second_tries.inc()

    def accepted(self) -> None:
        """Note that the replica accepted the stream. gRPC reports this for failed streams too, so `add` decides."""
        self._accepted = perf_counter()

    def add(self, tokens: int) -> None:
        """Count a streamed message with so many tokens."""
        self._latest = perf_counter()
        if not self.generated:
            self._first, self._first_tokens = self._latest, tokens
            self._metrics.handoff.observe(self._accepted - self._sent)
            self._metrics.first_token.observe(self._latest - self._arrived)
        self.generated += tokens

    def abandoned(self) -> None:
        """Charge everything: the caller left a unary call, and the replica may have generated all of it meanwhile.

        Whether a replica had accepted the call is unknown: for unary calls gRPC reports that with the answer.
        """
        self._abandoned = True

    def refused(self) -> None:
        """Charge only what had been streamed: the request ends with an error."""
        self._sent_to_replica, self._abandoned = self.generated > 0, False

    def end(self) -> None:
        """Refund what was charged and not used, and update the metrics."""
        done = self._prompt + self._work + self.generated if self._sent_to_replica else 0
        used = self._charged if self._abandoned else done
        self._take(min(0, used - self._charged))
        self._metrics.tokens(self.tenant, self._prompt if self._sent_to_replica else 0, self.generated)
        if self._first and self.generated > self._first_tokens:
            self._metrics.token.observe((self._latest - self._first) / (self.generated - self._first_tokens))


class UsageMeter:
    """Creates a `RequestUsage` for each request, under the tenants' limits."""

    def __init__(self, limits: TenantLimits, metrics: GatewayMetrics) -> None:
        self._limits, self._metrics = limits, metrics

    @contextmanager
    def request(self, tenant: str) -> Iterator[RequestUsage]:
        """Count a request of a tenant while the block runs. Raises Exhausted if it is one too many."""
        self._metrics.request(tenant)
        with self._limits.request(tenant) as take:
            meter = RequestUsage(self._metrics, tenant, take)
            try:
                yield meter
            except Expired:
                raise
            except Exception:  # bugs of ours too
                meter.refused()
                raise
            except asyncio.CancelledError:
                if rpc.drained():  # our own drain ended it, the caller would have waited
                    meter.refused()
                raise
            finally:
                meter.end()
