"""A simulated engine: an HTTP server that checks what it receives and answers as a test tells it to.

It speaks as much of vLLM's OpenAI API as the Conductor uses: health, models, describe, completions and chat.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import httptools

MODEL = "tiny"
FINGERPRINT: dict[str, str | int] = {"model": "abc", "dtype": "bfloat16", "block_size": 16}


@dataclass
class Received:
    """One request as an engine saw it."""

    method: str
    path: str
    version: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def params(self) -> dict[str, Any] | None:
        """Our part of ``kv_transfer_params``."""
        found: dict[str, Any] | None = (self.json.get("kv_transfer_params") or {}).get("mooncake")
        return found


Behaviour = Callable[["Connection", Received], Awaitable[None]]


def sse(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "cmpl-1", "choices": [choice]}).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


PLAIN = json.dumps({"id": "cmpl-1", "choices": [{"index": 0, "text": " hello", "finish_reason": "stop"}]}).encode()
EVENTS = [sse(" one"), sse(" two"), sse(" thr\u00e9e", "stop"), b"data: [DONE]\n\n"]
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


class Connection(asyncio.Protocol):
    """One connection from the Conductor. ``gone`` is set when the peer has closed it."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self.gone = asyncio.Event()
        self._queue: asyncio.Queue[Received | None] = asyncio.Queue()
        self._reset()

    def _reset(self) -> None:
        self._headers: dict[str, str] = {}
        self._body = self._url = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self.engine.connections.add(self)
        task = asyncio.get_running_loop().create_task(self._serve())
        self.engine.tasks.add(task)
        task.add_done_callback(self.engine.tasks.discard)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        self.engine.connections.discard(self)
        self._queue.put_nowait(None)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        assert name.decode().lower() not in self._headers, f"header {name!r} twice"
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        received = Received(
            self._parser.get_method().decode(),
            self._url.decode(),
            self._parser.get_http_version(),
            self._headers,
            self._body,
        )
        self._queue.put_nowait(received)
        self._reset()

    async def _serve(self) -> None:
        while (received := await self._queue.get()) is not None:
            await self.engine.answer(self, received)

    # --- answers

    def write(self, data: bytes) -> None:
        if not self.gone.is_set() and not self.transport.is_closing():
            self.transport.write(data)

    def plain(self, body: bytes = PLAIN, status: int = 200, extra: bytes = b"") -> None:
        self.write(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n"
            % (status, len(body), extra)
            + body
        )

    def stream(self, events: list[bytes] = EVENTS) -> None:
        self.write(STREAM_HEAD + b"".join(map(chunk, events)) + b"0\r\n\r\n")

    def reset(self) -> None:
        """Close with a TCP reset."""
        self.transport.abort()


async def normal(connection: Connection, received: Received) -> None:
    """Answers as an engine does."""
    if received.json.get("stream"):
        connection.stream()
    else:
        connection.plain()


@dataclass(eq=False)
class SimulatedEngine:
    """One engine on a port of its own. ``behave`` answers completions; everything received is kept in ``seen``."""

    role: str = "both"
    instance: str = "i-1"
    models: tuple[str, ...] = (MODEL,)
    fingerprint: dict[str, str | int] = field(default_factory=lambda: dict(FINGERPRINT))
    version: int = 1
    has_connector: bool = True
    behave: Behaviour = normal
    is_healthy: bool = True
    seen: list[Received] = field(default_factory=list)
    described: int = 0
    connections: set[Connection] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    port: int = 0

    async def start(self) -> SimulatedEngine:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self.addresses = {"0,0": f"127.0.0.1:{self.port}"}
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """Die: the port is closed and every connection reset."""
        self._server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        while self.connections:
            await asyncio.sleep(0)
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def answer(self, connection: Connection, received: Received) -> None:
        if received.path == "/health":
            connection.plain(b"", 200 if self.is_healthy else 500)
        elif received.path == "/v1/models":
            cards = [{"id": name, "object": "model", "owned_by": "vllm"} for name in self.models]
            connection.plain(json.dumps({"object": "list", "data": cards}).encode())
        elif (received.params or {}).get("role") == "describe":
            self.described += 1
            connection.plain(self._description())
        else:
            self.seen.append(received)
            await self.behave(connection, received)

    def _description(self) -> bytes:
        if not self.has_connector:
            return json.dumps({"id": "cmpl-0", "choices": [], "kv_transfer_params": None}).encode()
        described = {
            "version": self.version,
            "instance": self.instance,
            "role": self.role,
            "addresses": self.addresses,
            "fingerprint": self.fingerprint,
        }
        return json.dumps({"id": "cmpl-0", "choices": [], "kv_transfer_params": {"mooncake": described}}).encode()
