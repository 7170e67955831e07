"""What each release of a tenant makes of a text: how likely it is, and what follows it.

    python examples/compare_releases.py "The story of the king and the" unpatched live

Releases are numbers, channels, or unpatched; a call reads the text once for all of them. Where the gateway is, and
whose key is used, are BACKPACK_GATEWAY_ADDRESS and BACKPACK_KEY, or those of `make run` on this machine.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from backpack_serving.client import Client, ServiceError

ADDRESS = os.environ.get("BACKPACK_GATEWAY_ADDRESS", "127.0.0.1:8470")


def key() -> str:
    return os.environ.get("BACKPACK_KEY") or Path("var/harbour.key").read_text().strip()


def release(name: str) -> int | str:
    """0 is the model unpatched."""
    return int(name) if name.isdigit() else 0 if name == "unpatched" else name


def main(text: str = "The story of the king and the", *names: str) -> None:
    releases = [release(name) for name in names or ("unpatched", "live")]
    with Client(ADDRESS, key()) as client:
        scores = client.compare_scores(text, releases)
        predictions = client.compare(text, releases, top=3)
    for score, prediction in zip(scores, predictions, strict=True):
        served = prediction.served
        print(f"release {served.release} ({served.digest[:12]}): perplexity of the text {score.perplexity:.2f}")
        for token in prediction.top:
            print(f"    {math.exp(token.log_probability or 0):7.2%}  {token.text!r}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ServiceError, OSError) as error:
        sys.exit(f"error: {error}")
