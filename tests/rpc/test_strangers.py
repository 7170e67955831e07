"""Who speaks HTTP/2 as no client of ours does."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path

from backpack_serving.inference import directory
from backpack_serving.observability.metrics import Metrics
from backpack_serving.rpc.server import STREAMS
from backpack_serving.settings import Settings

DATA, HEADERS, RESET = 0, 1, 3
LAST, REFUSED = 1, 7


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def begin(stream: int, path: str, **more: str) -> bytes:
    """The beginning of a call, with nothing in it that needs a table."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    fields |= {"content-type": "application/grpc"} | more
    block = b"".join(b"\0" + bytes([len(n)]) + n.encode() + bytes([len(v)]) + v.encode() for n, v in fields.items())
    return frame(HEADERS, 4, stream, block)


OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(4, 1, 0)


def _resets(connection: socket.socket, until: int) -> list[int]:
    """Why streams were reset, as far as the answer to a ping or so many of them."""
    found, data = [], b""
    with connection.makefile("rb") as answers:
        while len(found) < until and (data := answers.read(9)):
            payload = answers.read(int.from_bytes(data[:3], "big"))
            if data[3] == RESET:
                found.append(int.from_bytes(payload, "big"))
    return found


def answered(address: str, call: bytes) -> bool:
    """Whether a call on a connection of its own gets an answer; else only a status."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(OPENING + call)
        with connection.makefile("rb") as answers:
            while head := answers.read(9):
                answers.read(int.from_bytes(head[:3], "big"))
                if head[3] == DATA:
                    return True
                if head[3] == HEADERS and head[4] & LAST:
                    return False
    return False


async def test_a_connection_has_no_more_calls_than_leave_room_for_others(tmp_path: Path) -> None:
    """Beyond a thousand that wait, gRPC refuses anybody's: one who opened and reset calls kept all others out."""
    server = await directory.serve(Settings(state=tmp_path, directory_address="127.0.0.1:0"), Metrics())
    host, _, port = server.address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=30) as stranger:
            path = "/backpack.v1.DirectoryService/Report"
            calls = b"".join(begin(2 * n + 1, path) for n in range(STREAMS + 10))
            stranger.sendall(OPENING + calls)
            assert await asyncio.to_thread(_resets, stranger, 10) == [REFUSED] * 10
    finally:
        await server.stop()
