"""HTTP load from one process; prints one JSON object.

    load_gen.py PORT CONNECTIONS SECONDS PROMPT_BYTES TOKENS INTERVAL_US RATE

TOKENS 0: plain answers; else streams of TOKENS chunks, INTERVAL_US apart at the engine. RATE 0: closed loop on every
connection; else open loop, requests/s, and latencies count from the scheduled time. The first 15% of SECONDS is left
out of the latencies.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from time import perf_counter  # uvloop's own clock counts milliseconds
from typing import cast

import uvloop

_LENGTH = b"content-length: "


class Connection(asyncio.Protocol):
    """One connection: one request at a time."""

    def __init__(self, load: Load) -> None:
        self._load, self._data, self._end = load, b"", 0
        self.begun_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, scheduled_at: float) -> None:
        self.begun_at, self._data, self._end = scheduled_at, b"", 0
        self.transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        if self._end >= 0:
            self._head(data)
        if self._end == -1:
            self._load.chunks += data.count(b"data: {")
            if data.endswith(b"\r\n0\r\n\r\n"):
                self._load.finished(self)
        elif 0 < self._end <= len(self._data):
            self._load.finished(self)

    def _head(self, data: bytes) -> None:
        self._data += data
        if not self._end and (at := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:at].lower()
            self._load.errors += not head.startswith(b"http/1.1 200")
            length = head.find(_LENGTH)
            self._end = -1 if length < 0 else at + 4 + int(head[length + len(_LENGTH) :].split(b"\r\n")[0])

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.errors += not self._load.is_over


class Load:
    """All connections and what was measured."""

    def __init__(self, seconds: float, size: int, tokens: int, interval_us: int, rate: float, port: int) -> None:
        text = "".join(" " if n % 6 == 5 else chr(97 + n * 7 % 26) for n in range(size))
        body = {"model": "mock", "messages": [{"role": "user", "content": text}], "max_tokens": tokens or 16}
        data = json.dumps(
            body | {"temperature": 0, "seed": interval_us, "stream": bool(tokens)}, separators=(",", ":")
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        self.request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data
        self.loop, self.rate = asyncio.get_running_loop(), rate
        self.begun_at = perf_counter()
        self.warm_at, self.stop_at = self.begun_at + 0.15 * seconds, self.begun_at + seconds
        self.chunks = self.errors = self.done = self.late = 0
        self.is_over = False
        self.latencies: list[float] = []
        self.idle: deque[Connection] = deque()
        self.busy: set[Connection] = set()

    def start(self, connection: Connection, scheduled_at: float) -> None:
        self.busy.add(connection)
        connection.ask(scheduled_at)

    def finished(self, connection: Connection) -> None:
        now = perf_counter()
        self.done += 1
        self.busy.discard(connection)
        if self.warm_at <= now <= self.stop_at:
            self.latencies.append(now - connection.begun_at)
        if not self.rate and now < self.stop_at:
            self.start(connection, now)
        else:
            self.idle.append(connection)

    async def open_loop(self) -> None:
        due = perf_counter()
        while (now := perf_counter()) < self.stop_at:
            while due <= now:
                if self.idle:
                    self.start(self.idle.popleft(), due)
                else:
                    self.late += 1
                due += 1 / self.rate
            await asyncio.sleep(due - now)

    def report(self) -> dict[str, float]:
        ordered = sorted(self.latencies) or [0.0]
        p50, p99 = (ordered[int(q * (len(ordered) - 1))] * 1e6 for q in (0.5, 0.99))
        spent = self.stop_at - self.warm_at
        return {
            "done": self.done,
            "rps": len(self.latencies) / spent,
            "p50": p50,
            "p99": p99,
            "chunks": self.chunks,
            "errors": self.errors + len(self.busy),
            "late": self.late,
        }


async def _main(
    port: int, connections: int, seconds: float, size: int, tokens: int, interval_us: int, rate: float
) -> None:
    load = Load(seconds, size, tokens, interval_us, rate, port)
    for _ in range(connections):
        _, connection = await load.loop.create_connection(lambda: Connection(load), "127.0.0.1", port)
        if rate:
            load.idle.append(connection)
        else:
            load.start(connection, perf_counter())
    if rate:
        await load.open_loop()
    give_up_at = load.stop_at + 30
    while (load.busy or perf_counter() < load.stop_at) and perf_counter() < give_up_at:
        await asyncio.sleep(0.01)
    load.is_over = True
    print(json.dumps(load.report()))


if __name__ == "__main__":
    values = [float(value) for value in sys.argv[1:8]]
    uvloop.run(
        _main(int(values[0]), int(values[1]), values[2], int(values[3]), int(values[4]), int(values[5]), values[6])
    )
