"""Logs: one line an event, for people on a console, as JSON for machines."""

from __future__ import annotations

import logging
import sys

import structlog

from backpack_serving.settings import Settings


def configure(settings: Settings) -> None:
    """Send logs to stderr in the chosen format, from the chosen level on."""
    human = settings.log_format == "console"
    render = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if human else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if human else "iso", utc=not human),
            structlog.processors.StackInfoRenderer(),
            *([] if human else [structlog.processors.format_exc_info]),
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level.upper()),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(level=settings.log_level.upper(), stream=sys.stderr)
    logging.getLogger("alembic").setLevel(logging.WARNING)
