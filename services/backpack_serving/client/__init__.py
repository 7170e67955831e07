"""Clients of a gateway: `Client`, and `AsyncClient` for asyncio. Neither loads torch.

    from backpack_serving.client import Client

    with Client("127.0.0.1:8470", key="bp_…") as client:
        for part in client.stream("The story of the king"):
            print(part.text, end="", flush=True)

Reads that fail for want of a server are repeated by the channel. Generation is repeated as long as nothing of it
has come, up to `attempts` times, and never after that: half a text can't be taken back. Everything else that goes
wrong is a `ServiceError`; `retry_after` says when another try may succeed.
"""

from backpack_serving.client.aio import AsyncClient
from backpack_serving.client.blocking import Client
from backpack_serving.client.requests import Sampling
from backpack_serving.client.results import (
    Contribution,
    Explanation,
    Generation,
    Model,
    Part,
    Score,
    Sense,
    Senses,
    Served,
    Token,
)
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
from backpack_serving.tls import Tls

__all__ = [
    "AsyncClient",
    "Client",
    "Conflict",
    "Contribution",
    "Exhausted",
    "Expired",
    "Explanation",
    "Forbidden",
    "Generation",
    "InvalidRequest",
    "Model",
    "NotFound",
    "Part",
    "PreconditionFailed",
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
