"""A link between a client and a server that can be cut, or stop carrying anything, at any moment."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Self

from tests.unit.clients.fake_server import FakeServer, Feed

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class Proxy:
    """Takes connections on a port of its own and carries them to a server.

    Attributes:
        connections: how many were taken.
    """

    def __init__(self, server: FakeServer) -> None:
        self.connections = 0
        self._target = server
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._links: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def address(self) -> str:
        """HOST:PORT to give to a client."""
        return "{}:{}".format(*self._listener.getsockname())

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        # Woken by a connection: cancelling could lose one that was taken at this very moment.
        with socket.create_connection(self._listener.getsockname()):
            await self._accepting
        self._listener.close()
        await self._cut()

    async def cut(self, feed: Feed | None = None) -> None:
        """Resets every connection when what was sent has passed; new ones are taken."""
        await asyncio.sleep(0.03)
        await self._cut()

    async def freeze(self, feed: Feed | None = None) -> None:
        """Carries nothing any more, in either direction, on old and new connections."""
        self._flowing.clear()

    async def _accept(self) -> None:
        while not self._closing:
            here, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            self.connections += 1
            link = asyncio.create_task(self._carry_both(here))
            self._links.add(link)
            link.add_done_callback(self._links.discard)

    async def _cut(self) -> None:
        await asyncio.sleep(0)  # a task that is cancelled before its first step would not close its socket
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def _carry_both(self, here: socket.socket) -> None:
        with here, socket.socket() as there:
            there.setblocking(False)
            for end in (here, there):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await asyncio.get_running_loop().sock_connect(there, ("127.0.0.1", self._target.port))
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._carry(here, there))
                    both.create_task(self._carry(there, here))
            except* OSError:
                pass  # one end is gone, so is the other

    async def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, 65536):
            await self._flowing.wait()
            await loop.sock_sendall(sink, data)
        raise ConnectionResetError
