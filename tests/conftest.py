"""What holds for all tests."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import pytest
import structlog
import torch
import uvloop
from backpack_lm import processor

if TYPE_CHECKING:
    from backpack_serving.inference.served_model import ServedModel

# Compared token by token with the reference model, which is float32; what bfloat16 does has tests of its own.
os.environ.setdefault("BACKPACK_PRECISION", "float32")
# Small and in the repository. The tests of pages and of installing say that they want another.
os.environ.setdefault("BACKPACK_MODEL", "micro")
# Judging each new release takes time that those tests alone need which are about it.
os.environ.setdefault("BACKPACK_DEGRADATION", "inf")
# Servers of tests that run beside each other.
os.environ.setdefault("BACKPACK_HTTP_ADDRESS", "127.0.0.1:0")
# A shell without job control starts what is in the background so that it ignores Ctrl-C, and so does what that starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Read when Triton is imported, whoever does that first. Where there is no GPU, its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _logs_of_this_test_only() -> Iterator[None]:
    """A command that a test runs in this process configures logging; what it logs to is closed after the test."""
    yield
    structlog.reset_defaults()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what these results hold for."""
    terminalreporter.write_line(f"processor: {processor.described()}")


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The event loop that servers have."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def served() -> ServedModel:
    """The default model, as replicas read it. Nobody changes it."""
    from backpack_lm.installed import folder_of
    from backpack_serving.inference.served_model import ServedModel

    return ServedModel.read(folder_of("micro"))


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


PROXY_VARIABLES = {
    name: "http://127.0.0.1:1"
    for low in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    for name in (low, low.upper())
}
"""What container engines put into containers where the host has a proxy; this one answers nobody."""
