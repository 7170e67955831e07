"""The lines between a benchmark and a peer's script, which imports this from the folder that it lies in."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(start: Callable[[], Any]) -> None:
    """Start a peer, say what runs, and answer each line of the input by a measurement; ends with the input.

    The peer has `describe()`, and `measure(batch, prompt, new)`, which raises ValueError for what it can't do.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    peer = start()
    print(json.dumps(peer.describe()), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = peer.measure(**json.loads(line))
        except (TypeError, ValueError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)
