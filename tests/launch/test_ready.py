"""Readiness is an answer 200, and nothing else."""

from __future__ import annotations

import asyncio

import pytest

from mooncake_plugins.launch import _ready
from mooncake_plugins.launch._ready import answers_200, wait_until_ready


async def ask(answer: bytes, *, hangs: bool = False) -> tuple[bool, bytes]:
    heard = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if hangs:
            await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return await answers_200(f"http://127.0.0.1:{port}/health?full=1"), heard


def test_200_is_ready() -> None:
    is_ready, heard = asyncio.run(ask(b"HTTP/1.1 200 OK\r\n\r\n"))
    assert is_ready
    assert heard.startswith(b"GET /health?full=1 HTTP/1.1\r\nHost: 127.0.0.1:")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 No\r\n\r\n",
        b"HTTP/1.1\r\n",
        b"HTTP/1.1 abc\r\n",
        b"SSH-2.0 200\r\n",
        b"",
        b"\xff" * 70_000,
        b"HTTP/1.1 200",
    ],
)
def test_anything_else_is_not(answer: bytes) -> None:
    assert not asyncio.run(ask(answer))[0]


def test_a_server_that_hangs_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ready, "ANSWER_TIMEOUT_S", 0.1)
    assert not asyncio.run(ask(b"HTTP/1.1 ", hangs=True))[0]


def test_nobody_there_is_not_ready() -> None:
    assert not asyncio.run(answers_200("http://127.0.0.1:1/"))


def test_waits_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])

    async def answer(url: str) -> bool:
        return next(answers)

    monkeypatch.setattr(_ready, "answers_200", answer)
    monkeypatch.setattr(_ready, "POLL_EVERY_S", 0.0)
    asyncio.run(wait_until_ready("http://x/"))
    assert next(answers, None) is None
