"""Processes that start, for tests of what they wait for and what ends them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.waiting import wait_until

AGES = 90.0
"""Seconds after which something that was to happen never will."""


class Started:
    """A command of ours in a process, with the variables of its settings."""

    def __init__(self, state: Path, *words: str, **settings: str) -> None:
        where = {
            "STATE": str(state),
            "DRAIN": "86400",  # of a start there is nothing to drain
            **{f"{part}_ADDRESS": "127.0.0.1:0" for part in ("GATEWAY", "INTERVENTIONS", "DIRECTORY")},
            **settings,
        }
        self._said = state / "said"
        with self._said.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "backpack_serving.cli.main", *words],
                env={
                    **os.environ,
                    **{f"BACKPACK_{name}": value for name, value in where.items()},
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "PYTHONUNBUFFERED": "1",
                    "NO_COLOR": "1",
                },
                stdout=said,
                stderr=said,
            )

    @property
    def said(self) -> str:
        return self._said.read_text()

    def until(self, text: str) -> None:
        """Wait until it has said this."""

        def has_said() -> bool:
            found = text in self.said
            assert found or self.process.poll() is None, f"it ended with {self.process.returncode}: {self.said}"
            return found

        wait_until(has_said, f"that it says {text!r}", AGES)

    def ends(self, *signals: signal.Signals) -> int:
        """The exit status after these signals."""
        for number in signals:
            self.process.send_signal(number)
        return self.process.wait(AGES)


@contextmanager
def started(state: Path, *words: str, **settings: str) -> Iterator[Started]:
    """Such a process, killed at the end if it is still there."""
    state.mkdir(exist_ok=True)
    one = Started(state, *words, **settings)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()


def read_until_served(process: subprocess.Popen[str]) -> str:
    """What `backpack run` prints until it serves, its last line included."""
    assert process.stdout is not None
    shown = ""
    for line in process.stdout:
        shown += line
        if line.startswith("Serving until"):
            return shown
    raise AssertionError(f"it ended with {process.wait()}: {shown}")


@contextmanager
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"
