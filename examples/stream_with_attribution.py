"""Text as it is made, and after each word which sense of which word before it spoke for it most.

    python examples/stream_with_attribution.py "The story of the king and the"

Several samples come mixed in one stream; a part says which one it is of. Where the gateway is, and whose key is
used, are BACKPACK_GATEWAY_ADDRESS and BACKPACK_KEY, or those of `make run` on this machine.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from backpack_serving.client import AsyncClient, Sampling, ServiceError

ADDRESS = os.environ.get("BACKPACK_GATEWAY_ADDRESS", "127.0.0.1:8470")
SAMPLING = Sampling(max_tokens=6, temperature=0.7, top_k=30, seed=3, samples=2)


def key() -> str:
    return os.environ.get("BACKPACK_KEY") or Path("var/harbour.key").read_text().strip()


async def main(prompt: str = "The story of the king and the") -> None:
    texts = [""] * SAMPLING.samples
    async with AsyncClient(ADDRESS, key()) as client:
        async for part in client.stream(prompt, SAMPLING, explain=1):
            texts[part.sample] += part.text
            for token in part.tokens:
                assert token.explanation is not None, "it was asked for"
                (most,) = token.explanation.contributions
                print(
                    f"sample {part.sample}: {token.text!r:14} logit {token.explanation.logit:6.2f}, "
                    f"{most.contribution:+5.2f} by sense {most.sense:2} of {most.token.text!r} at {most.position}"
                )
    for text in texts:
        print(prompt + text)


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:2]))
    except (ServiceError, OSError) as error:
        sys.exit(f"error: {error}")
