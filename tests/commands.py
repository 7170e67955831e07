"""Commands that tests run beside their servers, as somebody at a terminal would."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

from tests.conftest import PROXY_VARIABLES


async def run_command(*command: str, seconds: float = 120, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with this test's path of imports and no proxy, in a thread of its own.

    `subprocess`, because uvloop starts a process by `fork`: then the handlers run that gRPC and OpenMP have for it,
    between threads that hold their locks, and now and then the child ends by SIGSEGV before it is the command.
    `subprocess` starts it by `vfork`, for which none runs.
    """
    environment = {**os.environ, **PROXY_VARIABLES, "PYTHONPATH": os.pathsep.join(sys.path), **settings}
    return await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
