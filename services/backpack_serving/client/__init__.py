"""Clients of a gateway: `Client`, and `AsyncClient` for asyncio. Neither loads torch.

    from backpack_serving.client import Client

    with Client("127.0.0.1:8470", key="bp_…") as client:
        for part in client.stream("The story of the king"):
            print(part.text, end="", flush=True)

They are given an address, host:port (or `dns:///name:port`, over all of whose addresses calls are spread), and a
key: an API key, a token, or a function that gives one; none where a client certificate (`tls`) says who calls.
`timeout` is in seconds, for a whole call; None: none.

Calls about text take `channel` (default "live"), whose release steers them; `request_key`, which decides under a
canary: the same key, the same release; and `since`, a position of the store: the call waits a moment until its
gateway knows as much, and `served.at` of each answer is one. Of a tenant's requests that wait, those of the
highest `priority` (−100 to 100) run first.

Reads that fail for want of a server are repeated by the channel. Generation is repeated as long as nothing of it
has come, up to `attempts` times, and never after that: half a text can't be taken back. Everything else that goes
wrong is a `ServiceError`; `retry_after` says when another try may succeed.
"""

from backpack_serving.client.blocking import Client
from backpack_serving.client.requests import Sampling
from backpack_serving.client.results import (
    Contribution,
    Explained,
    Explanation,
    Generation,
    Model,
    Part,
    Prediction,
    Sample,
    Score,
    Sense,
    Senses,
    Served,
    Token,
)
from backpack_serving.client.text import AsyncClient
from backpack_serving.errors import (
    Conflict,
    Exhausted,
    Expired,
    Forbidden,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    ServiceError,
    Unauthenticated,
    Unavailable,
)
from backpack_serving.sync.known import Position
from backpack_serving.tls import Tls

__all__ = [
    "AsyncClient",
    "Client",
    "Conflict",
    "Contribution",
    "Exhausted",
    "Expired",
    "Explained",
    "Explanation",
    "Forbidden",
    "Generation",
    "InvalidRequest",
    "Model",
    "NotFound",
    "Part",
    "Position",
    "PreconditionFailed",
    "Prediction",
    "Sample",
    "Sampling",
    "Score",
    "Sense",
    "Senses",
    "Served",
    "ServiceError",
    "Tls",
    "Token",
    "Unauthenticated",
    "Unavailable",
]
