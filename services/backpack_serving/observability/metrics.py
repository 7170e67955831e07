"""Every metric that there is, by name, in this one file.

The labels are bounded: methods, reasons and codes are ours, tenants are the busiest few, and nothing is ever
labelled by request, revision or digest.

A process has one registry; each part registers what it has to say. `names` lists what dashboards may ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from backpack_serving.observability.tenant_labels import TenantLabels

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
DAMAGE = ("WRONG_RELEASE", "WRONG_DIGEST", "CORRUPT")
"""Reasons of which a single error is an alert. Prometheus sees no increase in a series that begins at 1."""
_MILLISECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class Metrics:
    """What one process tells Prometheus. `tenants` is how many have a label of their own."""

    def __init__(self, tenants: int = 20) -> None:
        self.registry = CollectorRegistry()
        self._tenants = tenants
        ProcessCollector(registry=self.registry)
        self._calls = _CallCounters(self.registry)

    def calls(self, part: str) -> PartCalls:
        """Counts the calls that a part's server answers."""
        for reason in DAMAGE:
            self._calls.errors.labels(part, reason)
        return PartCalls(part, self._calls)

    def gateway(self, replicas: Callable[[], int], staleness: Callable[[], float]) -> GatewayMetrics:
        return GatewayMetrics(self.registry, self._tenants, replicas, staleness)

    def replica(self, load: Callable[[], EngineLoad], releases: Callable[[], int]) -> ReplicaMetrics:
        return ReplicaMetrics(self.registry, load, releases)


def names() -> set[str]:
    """The names of all series, as a query writes them: `…_total`, `…_bucket`, and so on."""
    metrics = Metrics()
    metrics.gateway(lambda: 0, lambda: 0.0)
    metrics.replica(_NoEngine, lambda: 0)
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {metric.name + ending for metric in metrics.registry.collect() for ending in endings[metric.type]}


# ---- every server


class _CallCounters:
    def __init__(self, registry: CollectorRegistry) -> None:
        # First, and counted last when a call ends: a scrape, in its own thread, then finds in the others what it
        # doesn't find here any more.
        self.running = Gauge("backpack_calls_running", "Calls in progress.", ["part", "method"], registry=registry)
        self.total = Counter(
            "backpack_calls", "Calls answered, by status code.", ["part", "method", "code"], registry=registry
        )
        self.errors = Counter("backpack_errors", "Calls refused, by reason.", ["part", "reason"], registry=registry)
        self.seconds = Histogram(
            "backpack_call_seconds",
            "From a call's arrival to its end.",
            ["part", "method"],
            registry=registry,
            buckets=_SECONDS,
        )


@dataclass(frozen=True, slots=True)
class PartCalls:
    """The calls of one part; an `rpc.Watcher`."""

    part: str
    of: _CallCounters

    def began(self, method: str) -> None:
        self.of.running.labels(self.part, _method_name(method)).inc()

    def ended(self, method: str, code: str, reason: str, seconds: float) -> None:
        method = _method_name(method)
        self.of.total.labels(self.part, method, code).inc()
        self.of.seconds.labels(self.part, method).observe(seconds)
        if reason:
            self.of.errors.labels(self.part, reason).inc()
        self.of.running.labels(self.part, method).dec()


def _method_name(method: str) -> str:
    return method.rpartition("/")[2]


# ---- gateway


class GatewayMetrics:
    """What clients see."""

    def __init__(
        self,
        registry: CollectorRegistry,
        tenants: int,
        replicas: Callable[[], int],
        staleness: Callable[[], float],
    ) -> None:
        self._labels = TenantLabels(tenants, self._drop)
        self._requests = Counter(
            "backpack_tenant_requests",
            "Requests of the busiest tenants, and of all others.",
            ["tenant"],
            registry=registry,
        )
        self._tokens = Counter(
            "backpack_tokens",
            "Tokens of answered requests: kind is `prompt` or `generated`.",
            ["tenant", "kind"],
            registry=registry,
        )
        self.first_token = Histogram(
            "backpack_time_to_first_token_seconds",
            "From a stream's arrival to its first message.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.token = Histogram(
            "backpack_time_per_output_token_seconds",
            "Mean time from token to token of a stream, after the first message.",
            registry=registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1),
        )
        self.handoff = Histogram(
            "backpack_handoff_seconds",
            "From choosing a replica until it has taken the stream.",
            registry=registry,
            buckets=_MILLISECONDS,
        )
        self.second_tries = Counter(
            "backpack_second_tries", "Requests sent to a second replica after the first failed.", registry=registry
        )
        _Readings(
            registry,
            Reading(GaugeMetricFamily, "backpack_replicas", "Replicas that may be sent requests.", replicas),
            Reading(
                GaugeMetricFamily,
                "backpack_staleness_seconds",
                "Since the intervention service was last heard.",
                staleness,
            ),
        )

    def request(self, tenant: str) -> None:
        """Count one more request of a tenant."""
        self._requests.labels(self._labels.count(tenant)).inc()

    def tokens(self, tenant: str, prompt: int, generated: int) -> None:
        """Count the tokens of a request that was answered."""
        label = self._labels.label(tenant)
        self._tokens.labels(label, "prompt").inc(prompt)
        self._tokens.labels(label, "generated").inc(generated)

    def _drop(self, tenant: str) -> None:
        self._requests.remove_by_labels({"tenant": tenant})
        self._tokens.remove_by_labels({"tenant": tenant})


# ---- replica


class EngineLoad(Protocol):
    """What an engine says of itself after a step; `backpack_serving.engine.engine.Load`."""

    @property
    def slots(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def queued(self) -> int: ...
    @property
    def tokens_in_flight(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def cache_capacity(self) -> int: ...
    @property
    def reused_tokens(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...
    @property
    def preemptions(self) -> int: ...


class ReplicaMetrics:
    """How busy a replica is and what it saves."""

    def __init__(
        self, registry: CollectorRegistry, load: Callable[[], EngineLoad], releases: Callable[[], int]
    ) -> None:
        self.tokens = Counter(
            "backpack_replica_tokens",
            "Tokens: kind is `prompt` (asked for) or `generated`; see also the reused ones.",
            ["kind"],
            registry=registry,
        )
        self.prompts = Counter("backpack_replica_prompts", "Prompts that were taken in.", registry=registry)
        self.release_seconds = Histogram(
            "backpack_replica_release_seconds",
            "To have a request's release ready: a look-up, or fetching and compiling it.",
            registry=registry,
            buckets=(0.0001, *_SECONDS),
        )
        self.report_seconds = Histogram(
            "backpack_replica_report_seconds",
            "A report to the directory; under Ray, a call through a Serve handle.",
            registry=registry,
            buckets=(*_MILLISECONDS, 2),
        )
        gauge, counter, name = GaugeMetricFamily, CounterMetricFamily, "backpack_replica_"
        _Readings(
            registry,
            Reading(gauge, f"{name}slots", "Sequences that can run at once.", lambda: load().slots),
            Reading(gauge, f"{name}running", "Sequences that run.", lambda: load().running),
            Reading(gauge, f"{name}queued", "Requests that wait for a slot.", lambda: load().queued),
            Reading(
                gauge,
                f"{name}tokens_in_flight",
                "Tokens that are still to be read or made for all of them.",
                lambda: load().tokens_in_flight,
            ),
            Reading(gauge, f"{name}cache_tokens", "Positions of pages in use.", lambda: load().cached_tokens),
            Reading(gauge, f"{name}cache_capacity_tokens", "Positions of all pages.", lambda: load().cache_capacity),
            Reading(
                counter,
                f"{name}reused_tokens",
                "Prompt tokens that were in a cache already.",
                lambda: load().reused_tokens,
            ),
            Reading(counter, f"{name}prefix_hits", "Prompts with a beginning in a cache.", lambda: load().prefix_hits),
            Reading(
                counter,
                f"{name}preemptions",
                "Sequences that had to give their pages to others, and were read again.",
                lambda: load().preemptions,
            ),
            Reading(gauge, f"{name}releases", "Compiled releases in memory.", releases),
        )


class _NoEngine:
    slots = running = queued = tokens_in_flight = cached_tokens = cache_capacity = 0
    reused_tokens = prefix_hits = preemptions = 0


# ---- values that are read when somebody scrapes


@dataclass(frozen=True, slots=True)
class Reading:
    family: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    documentation: str
    read: Callable[[], float]


class _Readings(Collector):
    def __init__(self, registry: CollectorRegistry, *readings: Reading) -> None:
        self._readings: Sequence[Reading] = readings
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        for reading in self._readings:
            yield reading.family(reading.name, reading.documentation, value=reading.read())
