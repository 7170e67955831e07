"""A TCP proxy that breaks what goes through it: resets, silence on a connection that stays open, refusals."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress


class FaultProxy:
    """Between clients and one server. `address` is where clients connect."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._host, self._port = host, int(port)
        self._streams: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._refusing = False
        self.connections = 0

    async def start(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        return self

    async def stop(self) -> None:
        self._flows.set()
        self.reset()
        self._server.close()
        await self._server.wait_closed()

    def reset(self) -> None:
        """End every connection with a RST: both ends get an error."""
        for pair in list(self._streams):
            for writer in pair:
                sock: socket.socket = writer.get_extra_info("socket")
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()

    def half_open(self) -> None:
        """From now on nothing gets through, and nobody is told."""
        self._flows.clear()

    def refuse(self) -> None:
        """The server is gone: connections end at once."""
        self._refusing = True
        self.reset()

    def heal(self) -> None:
        self._refusing = False
        self._flows.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refusing:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, back)
        self._streams.add(pair)
        try:
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        finally:
            self._streams.discard(pair)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await self._flows.wait()
                sink.write(data)
                await sink.drain()
        with suppress(OSError):
            sink.close()
