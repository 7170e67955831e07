"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from backpack_serving import rpc
from backpack_serving.http import refusals
from backpack_serving.http.calls import Receive, Scope, Send, current

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold them back
]


class EventStream:
    """An ASGI application that sends objects as events, then `[DONE]`.

    An error before the first object is an ordinary answer; later it is an event, the last one.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            call = current()
            try:
                await _send_event(send, first)
                async for event in events:
                    await _send_event(send, event)
                last = b"data: [DONE]\n\n"
            except asyncio.CancelledError:
                if not call.ended:
                    raise
                last = _event(refusals.body(call.drained()))
            except Exception as error:
                refusal = rpc.refusal_of(error, scope["path"])
                call.refused(refusal)
                last = _event(refusals.body(refusal))
            await send({"type": "http.response.body", "body": last})


async def _send_event(send: Send, event: dict[str, Any]) -> None:
    await send({"type": "http.response.body", "body": _event(event), "more_body": True})


def _event(event: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
