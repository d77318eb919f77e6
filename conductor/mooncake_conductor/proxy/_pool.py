"""All connections to one engine: a bounded keep-alive pool."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from mooncake_conductor.core import Engine
from mooncake_conductor.proxy._httptools import HttpTools
from mooncake_conductor.proxy._metrics import Metrics
from mooncake_conductor.proxy._options import ProxyOptions
from mooncake_conductor.proxy._request import Request
from mooncake_conductor.proxy._unchunked import UnchunkedUpstream
from mooncake_conductor.proxy._upstream import Failure, Leg, Upstream


class EnginePool:
    """Connections to one engine, idle and busy. One event loop owns it.

    Attributes:
        links: Every open connection.
        on_idle_lost: Called when the engine closed an idle connection before this side would have.
    """

    def __init__(
        self,
        engine: Engine,
        address: tuple[str, int],
        tools: HttpTools,
        options: ProxyOptions,
        metrics: Metrics,
        authorization: bytes = b"",
    ) -> None:
        self.engine, self.address, self.tools, self.options, self.metrics = engine, address, tools, options, metrics
        self._authorization = authorization
        self.links: set[Upstream] = set()
        self.on_idle_lost: Callable[[], None] = lambda: None
        self._idle: deque[Upstream] = deque()
        self._lines: dict[tuple[str, bool], bytes] = {}
        self._dials: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time

    def head(self, path: str, request: Request, length: int) -> bytes:
        """Head of a request with a JSON body, in the client's own version of HTTP."""
        line = self._lines.get((path, request.is_http10))
        if line is None:
            line = self._lines[path, request.is_http10] = self._line(path, request.is_http10)
        credentials = self._authorization or request.authorization
        if credentials:
            return b"%bauthorization: %b\r\n%bcontent-length: %d\r\n\r\n" % (
                line,
                credentials,
                request.forwarded,
                length,
            )
        return b"%b%bcontent-length: %d\r\n\r\n" % (line, request.forwarded, length)

    def _line(self, path: str, is_http10: bool) -> bytes:
        host, port = self.address
        host = f"[{host}]" if ":" in host else host
        version = "1.0" if is_http10 else "1.1"
        return f"POST {path} HTTP/{version}\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n".encode()

    def probe(self, method: str, path: str, body: bytes) -> list[bytes]:
        """Parts of a request that the Conductor makes on its own behalf."""
        head = self._line(path, is_http10=False).replace(b"POST ", method.encode() + b" ", 1)
        if self._authorization:
            head += b"authorization: " + self._authorization + b"\r\n"
        return [head + b"content-length: %d\r\n\r\n" % len(body), body]

    def send(self, leg: Leg) -> None:
        """Send a leg over an idle connection, or a new one. Its owner is never called from inside this call."""
        while self._idle and not leg.is_http10:
            link = self._idle.pop()
            if link.transport is not None and not link.transport.is_closing():
                link.begin(leg)
                return
        self.send_fresh(leg)

    def send_fresh(self, leg: Leg) -> None:
        """Send a leg over a new connection."""
        task = self._loop.create_task(self._connect(leg))
        leg.dialing(task)
        self._dials.add(task)
        task.add_done_callback(self._dials.discard)

    async def _connect(self, leg: Leg) -> None:
        link = UnchunkedUpstream(self) if leg.is_http10 else Upstream(self)
        try:
            async with asyncio.timeout(self.options.connect_s):
                await self._loop.create_connection(lambda: link, *self.address)
        except (OSError, TimeoutError) as error:
            link.abort()
            leg.dialing(None)
            reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
            leg.owner.leg_failed(leg, Failure(f"it cannot be reached ({reason})", is_connection=True))
        except asyncio.CancelledError:
            link.abort()  # connected in the very moment of the cancellation
            raise
        else:
            leg.dialing(None)
            if link.transport is None or link.transport.is_closing():
                leg.owner.leg_failed(leg, Failure("it closed the connection at once", is_connection=True))
            else:
                link.begin(leg)

    def put(self, link: Upstream) -> None:
        """Keep a connection for the next leg."""
        if len(self._idle) >= self.options.pool_connections:
            if link.transport is not None:
                link.transport.close()
            return
        link.idle_since = self._loop.time()
        self._idle.append(link)

    def idle_lost(self, link: Upstream) -> None:
        """A connection without a leg is gone."""
        if link.idle_since:
            link.idle_since = 0.0
            if link in self._idle:
                self._idle.remove(link)
                self.on_idle_lost()

    def tick(self, now: float) -> None:
        """Close what was idle for too long."""
        while self._idle and now - self._idle[0].idle_since > self.options.pool_idle_s:
            link = self._idle.popleft()
            link.idle_since = 0.0
            if link.transport is not None:
                link.transport.close()

    async def close(self) -> None:
        """Close every connection and end every attempt to connect."""
        for task in list(self._dials):
            task.cancel()
        await asyncio.gather(*self._dials, return_exceptions=True)
        for link in list(self.links):
            link.abort()
        self._idle.clear()
