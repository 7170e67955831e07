"""Logs: one line an event, for people on a console, as JSON for machines; and spans, if a collector is named.

What is bound to structlog's context variables (`request_id`, `tenant`) is in every line that a call writes.
Prompts never are, unless `log_prompts` is set; tracebacks show no variables.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog
from backpack_lm.visible import visible

from backpack_serving.observability import tracing
from backpack_serving.settings import Settings


def configure(settings: Settings, service: str) -> None:
    """Send logs to stderr in the chosen format, from the chosen level on, and spans as `backpack-<service>`.

    Raises ValueError if spans can't be sent.
    """
    if settings.otel_endpoint:
        tracing.configure(settings.otel_endpoint, service)
    human = settings.log_format == "console"
    console = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_traceback)
    render = console if human else structlog.processors.JSONRenderer()
    chain: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if human else "iso", utc=not human),
        structlog.processors.StackInfoRenderer(),
        # A log is read on a terminal; JSON escapes what isn't ASCII anyway.
        _visible if human else structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*chain, render],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level.upper()),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)  # what libraries say, and asyncio of a task that failed
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=chain,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    handler.addFilter(_is_ours)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _visible(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """An event whose values are texts that a terminal shows and doesn't obey: tenants' words get into logs."""
    return {name: visible(value) if isinstance(value, str) else value for name, value in event.items()}


def _traceback(log: TextIO, exception: Any) -> None:
    written = io.StringIO()
    structlog.dev.plain_traceback(written, exception)
    log.write(visible(written.getvalue()))


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether it isn't what gRPC logs, as errors with tracebacks, of what callers do.

    Metadata that are no UTF-8 it shows in full, a key that is wrong in one character among them; nothing can be
    sent to who leaves in that moment.
    """
    return not str(record.msg).startswith(("Invalid encoding on ", "ExecuteBatchError raised in core "))
