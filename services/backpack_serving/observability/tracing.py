"""OpenTelemetry spans, off unless `configure` is given where to send them. The libraries are the extra `otel`.

As with logs, the libraries keep one tracer for the process; nothing else here is shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from backpack_serving import proxies
from backpack_serving.install import install_command

_tracer: Any = None

EXPORT_SECONDS = 2.0
"""Most for a batch of spans with all attempts at it: a process whose collector is away ends that much later."""


def configure(endpoint: str, service: str) -> None:
    """Send spans to an OTLP collector (gRPC), http://host:port or https://…, as `backpack-<service>`.

    One on this machine is never called through a proxy; one elsewhere as gRPC does (see `proxies`).

    Raises ValueError if the libraries aren't installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError(f"BACKPACK_OTEL_ENDPOINT needs `{install_command('otel')}`: {error}") from None
    provider = TracerProvider(resource=Resource.create({"service.name": f"backpack-{service}"}))
    here = proxies.is_here(urlsplit(endpoint).hostname or "")
    options: Any = (proxies.DIRECT,) if here else None  # the library's types want texts, gRPC a number
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS, channel_options=options)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    use(provider)


def use(provider: Any) -> None:
    """Make spans with this provider; None: none."""
    global _tracer
    _tracer = provider.get_tracer("backpack") if provider else None


@contextmanager
def served(method: str, metadata: Mapping[str, Any]) -> Iterator[None]:
    """The span of a call that a server answers, a child of the caller's."""
    if _tracer is None:
        yield
        return
    from opentelemetry import propagate
    from opentelemetry.trace import SpanKind

    headers = {name: value for name, value in metadata.items() if isinstance(value, str)}
    parent = propagate.extract(headers)
    with _tracer.start_as_current_span(method.lstrip("/"), parent, SpanKind.SERVER):
        yield


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[None]:
    """A span inside the current one. Leave it in the task that it was entered in."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(name, attributes=attributes):
        yield


def event(name: str) -> None:
    """Something that happened now, in the current span."""
    if _tracer is not None:
        from opentelemetry import trace

        trace.get_current_span().add_event(name)


def headers() -> tuple[tuple[str, str], ...]:
    """Metadata that makes spans of whoever is called children of the current one."""
    if _tracer is None:
        return ()
    from opentelemetry import propagate

    found: dict[str, str] = {}
    propagate.inject(found)
    return tuple(found.items())
