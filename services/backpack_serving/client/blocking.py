"""The clients for code without an event loop: method by method what those for asyncio do."""

from __future__ import annotations

from backpack_serving.client.connection import Blocking, blocking, blocking_stream
from backpack_serving.client.text import AsyncClient


class Client(Blocking[AsyncClient]):
    """Text from a gateway. Safe to use from many threads."""

    ASYNC = AsyncClient

    stream = blocking_stream(AsyncClient.stream)
    generate = blocking(AsyncClient.generate)
    score = blocking(AsyncClient.score)
    explain = blocking(AsyncClient.explain)
    compare = blocking(AsyncClient.compare)
    compare_scores = blocking(AsyncClient.compare_scores)
    senses = blocking(AsyncClient.senses)
    tokenize = blocking(AsyncClient.tokenize)
    model = blocking(AsyncClient.model)
