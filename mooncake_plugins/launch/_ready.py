"""Ask a URL whether it answers 200, without a client library."""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import urlsplit

POLL_EVERY_S = 0.2
ANSWER_TIMEOUT_S = 5.0


async def wait_until_ready(url: str) -> None:
    """Return as soon as the URL answers 200. Never ends otherwise: cancel it.

    Cancellation: a checkpoint; nothing is left open.
    """
    while not await answers_200(url):
        await asyncio.sleep(POLL_EVERY_S)


async def answers_200(url: str) -> bool:
    """Whether an ``http://`` URL answers 200 within a few seconds. Any failure is a no."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await _status(url) == 200
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return False


async def _status(url: str) -> int:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode("ascii"))
        status_line = await reader.readuntil(b"\r\n")
        return int(status_line.split()[1]) if status_line.startswith(b"HTTP/1.") else 0
    except IndexError:
        return 0
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
