"""One request as a gateway measures it."""

from __future__ import annotations

from time import perf_counter

from backpack_serving.metrics import GatewayMetrics


class Meter:
    """Times and tokens of a tenant's request, told to the metrics at the end of the `with` block."""

    def __init__(self, metrics: GatewayMetrics, tenant: str) -> None:
        self._metrics, self.tenant = metrics, tenant
        self._arrived = perf_counter()
        self._sent = self._first = self._latest = 0.0
        self._first_tokens = 0
        self.prompt = self.made = 0
        metrics.request(tenant)

    def send(self, tries: int) -> None:
        """A replica is about to be called."""
        self._sent = perf_counter()
        if tries:
            self._metrics.second_tries.inc()

    def taken(self) -> None:
        """The replica has the request."""
        self._metrics.handoff.observe(perf_counter() - self._sent)

    def add(self, tokens: int) -> None:
        """A message of a stream came, with so many tokens."""
        self._latest = perf_counter()
        if not self.made:
            self._first, self._first_tokens = self._latest, tokens
            self._metrics.first_token.observe(self._latest - self._arrived)
        self.made += tokens

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.tokens(self.tenant, self.prompt, self.made)
        if self._first and self.made > self._first_tokens:
            self._metrics.token.observe((self._latest - self._first) / (self.made - self._first_tokens))
