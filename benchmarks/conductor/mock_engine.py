"""Simulated engines for the overhead benchmark: one process, one port per argument ``prefill``, ``decode`` or
``coupled``.

Prints the ports on one line. A streamed request gets ``max_tokens`` chunks, one every ``seed`` microseconds (0: all at
once); any other a fixed answer. Describe probes and model lists are answered as the Conductor wants them.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from functools import partial
from typing import cast

import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_(?:completion_)?tokens": ?(\d+)')
_INTERVAL = re.compile(rb'"seed": ?(\d+)')
_STREAM = re.compile(rb'"stream": ?true')
_CHOICE = {"index": 0, "message": {"role": "assistant", "content": "hello from a mock engine"}, "finish_reason": "stop"}
_ANSWER = {"id": "chatcmpl-0", "object": "chat.completion", "created": 1, "model": "mock", "choices": [_CHOICE]}
_DELTA = {"index": 0, "delta": {"content": " tok"}, "logprobs": None, "finish_reason": None}
_EVENT = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 1, "model": "mock", "choices": [_DELTA]}
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def _whole(value: object) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


MODELS = _whole({"object": "list", "data": [{"id": "mock", "object": "model"}]})
ANSWER = _whole(_ANSWER)
EVENT = _chunk(b"data: " + json.dumps(_EVENT).encode() + b"\n\n")
END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Engine(asyncio.Protocol):
    """One connection."""

    def __init__(self, role: str) -> None:
        self._role, self._data, self._need = role, b"", 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._data = self._data + data if self._data else data
        if len(self._data) < self._need:
            return
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(self._data, 0, end)
            self._need = end + 4 + (int(found[1]) if found else 0)
            if len(self._data) < self._need:
                return
            request, self._data, self._need = self._data[: self._need], self._data[self._need :], 0
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        if request.startswith(b"GET"):
            self._transport.write(MODELS)
        elif b'"describe"' in request[-120:]:
            self._transport.write(_whole({"kv_transfer_params": {"mooncake": self._description()}}))
        elif _STREAM.search(request):
            tokens, interval = _TOKENS.search(request), _INTERVAL.search(request)
            self._transport.write(_HEAD)
            self._stream(int(tokens[1]) if tokens else 16, int(interval[1]) / 1e6 if interval else 0.0)
        else:
            self._transport.write(ANSWER)

    def _stream(self, left: int, interval_s: float) -> None:
        if self._transport.is_closing():
            return
        if not interval_s:
            self._transport.write(EVENT * left + END)
            return
        self._transport.write(EVENT if left > 1 else EVENT + END)
        if left > 1:
            self._loop.call_later(interval_s, self._stream, left - 1, interval_s)

    def _description(self) -> dict[str, object]:
        port = self._transport.get_extra_info("sockname")[1]
        addresses = {"0,0": f"127.0.0.1:{port}"}
        fingerprint = {"model": "mock", "block_size": 16}
        return {
            "version": 1,
            "instance": f"{port:032}",
            "role": self._role,
            "addresses": addresses,
            "fingerprint": fingerprint,
        }


async def _main(roles: list[str]) -> None:
    loop, ports = asyncio.get_running_loop(), []
    for role in roles:
        server = await loop.create_server(partial(Engine, role), "127.0.0.1", 0, backlog=4096)
        ports.append(str(server.sockets[0].getsockname()[1]))
    print(*ports, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1:]))
