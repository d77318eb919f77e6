"""Answers for clients that speak HTTP/1.0 and cannot take chunked coding.

Such a client's request goes to the engine as HTTP/1.0, which most servers answer without chunks; those that send them
anyway (uvicorn does) are relayed without the framing, and the client's connection ends with the answer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mooncake_conductor.proxy._upstream import END_OF_HEAD, Upstream

if TYPE_CHECKING:
    from mooncake_conductor.proxy._pool import EnginePool

_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r\n]*+", re.IGNORECASE)


class UnchunkedUpstream(Upstream):
    """A connection for one answer, relayed as its head (without ``Transfer-Encoding``) and the bytes of its body."""

    __slots__ = ("_head", "_parts")

    def __init__(self, pool: EnginePool) -> None:
        super().__init__(pool)
        self._head: bytes | None = b""
        self._parts: list[bytes] = []

    def on_body(self, data: bytes) -> None:
        """Called by the parser with bytes of the body, without framing."""
        self._parts.append(data)

    def _pass_on(self, data: bytes) -> None:
        plain = b""
        if self._head is not None:
            self._head += data
            if not self._is_head_done:
                return
            plain = _CHUNKED.sub(b"", self._head[: self._head.find(END_OF_HEAD) + len(END_OF_HEAD)])
            self._head = None
        plain += b"".join(self._parts)
        self._parts.clear()
        if plain or self._is_complete:
            super()._pass_on(plain)
