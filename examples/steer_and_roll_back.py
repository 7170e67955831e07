"""A word gets the senses of another: a patch, a release of it, what it does to a text, and back again.

    python examples/steer_and_roll_back.py king nurse

Where the servers are, and whose key is used, are BACKPACK_GATEWAY_ADDRESS, BACKPACK_INTERVENTIONS_ADDRESS and
BACKPACK_KEY, or those of `make run` on this machine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from backpack_serving.client import Client, Copy, Move, Sampling, ServiceError, Steering

GATEWAY = os.environ.get("BACKPACK_GATEWAY_ADDRESS", "127.0.0.1:8470")
INTERVENTIONS = os.environ.get("BACKPACK_INTERVENTIONS_ADDRESS", "127.0.0.1:8471")
SAMPLING = Sampling(max_tokens=16, temperature=0.7, top_k=30, seed=3)


def key() -> str:
    return os.environ.get("BACKPACK_KEY") or Path("var/harbour.key").read_text().strip()


def tell(client: Client, prompt: str, move: Move) -> None:
    made = client.generate(prompt, SAMPLING, since=move.at)  # not before the gateway knows of it
    print(f"release {made.served.release} ({made.served.digest[:12]}): {prompt}{made.text!r}")


def main(word: str = "king", source: str = "nurse") -> None:
    prompt = f"The story of the {word} and the"
    with Steering(INTERVENTIONS, key()) as steering, Client(GATEWAY, key()) as client:
        before = steering.channel()
        steering.create_patch(f"{word}-as-{source}", exist_ok=True)
        revision = steering.create_revision(f"{word}-as-{source}", [Copy(word, source)])
        release = steering.create_release([revision])
        # With the etag of what we saw, nobody who moved the channel since then is overruled.
        move = steering.activate(release.number, etag=before.etag, wait="all")
        try:
            tell(client, prompt, move)
        finally:
            back = steering.rollback(etag=move.channel.etag, wait="all")
        tell(client, prompt, back)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ServiceError, OSError) as error:
        sys.exit(f"error: {error}")
