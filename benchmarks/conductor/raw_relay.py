"""The floor: copies bytes between a client and one of several engines, one upstream connection per client, and looks at
nothing.

raw_relay.py PORT ENGINE_PORT...
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from typing import cast

import uvloop


class Upstream(asyncio.Protocol):
    """The engine's side."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._client.transport.write(data)


class Client(asyncio.Protocol):
    """The client's side."""

    def __init__(self, port: int) -> None:
        self._port, self._early = port, b""
        self._upstream: Upstream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._task = asyncio.get_running_loop().create_task(self._dial())

    def data_received(self, data: bytes) -> None:
        if self._upstream is None:
            self._early += data
        else:
            self._upstream.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._upstream is not None:
            self._upstream.transport.close()

    async def _dial(self) -> None:
        upstream = Upstream(self)
        await asyncio.get_running_loop().create_connection(lambda: upstream, "127.0.0.1", self._port)
        self._upstream = upstream
        if self._early:
            upstream.transport.write(self._early)


async def _main(port: int, engines: list[int]) -> None:
    turn = itertools.cycle(engines)
    server = await asyncio.get_running_loop().create_server(lambda: Client(next(turn)), "127.0.0.1", port, backlog=4096)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
