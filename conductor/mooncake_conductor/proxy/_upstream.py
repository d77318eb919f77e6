"""One request to one engine: what is sent, and the relay of its answer.

An answer is *validated*, not rebuilt: llhttp reads every byte to find where the message ends, and the bytes themselves
go on as they came, chunk framing included. While an answer is relayed, one received piece costs one parser call and one
write.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from mooncake_conductor.proxy._httptools import ResponseParser

if TYPE_CHECKING:
    from mooncake_conductor.proxy._pool import EnginePool

_HELD_LIMIT = 4 << 20
STALE_S = 1.0
END_OF_HEAD = b"\r\n\r\n"
_FRAMED = re.compile(rb"\n(?:content-length|transfer-encoding):", re.IGNORECASE)


class Failure(NamedTuple):
    """Why a leg got no complete answer. ``is_connection``: the engine could not be reached, or the connection broke."""

    reason: str
    is_connection: bool


class LegOwner(Protocol):
    """Whoever sent a leg. After `leg_failed`, `leg_done` or `Leg.abort` nothing more is called."""

    def leg_received(self, leg: Leg, *, is_complete: bool) -> None:
        """``leg.held`` has grown; its head is complete. Called until ``relay_to`` is set."""

    def leg_done(self, leg: Leg) -> None:
        """The answer is complete; its connection is free again."""

    def leg_failed(self, leg: Leg, failure: Failure) -> None:
        """There will be no complete answer."""


class Leg:
    """One request to one engine.

    Attributes:
        parts: What is sent; kept until the first byte of the answer, for one more try if a pooled connection was stale.
        held: Bytes of the answer that were not relayed yet; begins with the head.
        head_end: Length of the head inside ``held``; 0 until it is complete.
        status: 0 until the head is complete.
        is_until_close: The answer has no length; it ends with the connection.
        link: The connection, from when it is made until the leg ends.
    """

    __slots__ = ("_dial", "head_end", "held", "is_http10", "is_until_close", "link", "owner", "parts", "pool", "status")

    def __init__(self, pool: EnginePool, owner: LegOwner, parts: list[bytes], is_http10: bool = False) -> None:
        self.pool, self.owner, self.parts, self.is_http10 = pool, owner, parts, is_http10
        self.held, self.head_end, self.status, self.is_until_close = b"", 0, 0, False
        self.link: Upstream | None = None
        self._dial: asyncio.Task[None] | None = None

    def dialing(self, task: asyncio.Task[None] | None) -> None:
        """The pool connects for this leg (or no longer does)."""
        self._dial = task

    def abort(self) -> None:
        """Give up: the engine sees its client disconnect and stops computing."""
        link, self.link = self.link, None
        if link is not None:
            link.abort()
        if self._dial is not None:
            self._dial.cancel()
            self._dial = None


class Upstream(asyncio.Protocol):
    """One connection to an engine. Owned by its pool's ``links``.

    Attributes:
        transport: None before it is made and after it is lost.
        idle_since: Loop time; 0 while it is not in the pool.
    """

    __slots__ = (
        "_begun",
        "_begun_at",
        "_bytes",
        "_chunks",
        "_error",
        "_feed",
        "_is_complete",
        "_is_counted",
        "_is_head_done",
        "_is_lasting",
        "_is_mid_chunk",
        "_is_paused",
        "_is_reused",
        "_leg",
        "_parser",
        "_pool",
        "_sink",
        "_tail",
        "idle_since",
        "transport",
    )

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._leg: Leg | None = None
        self._sink: Callable[[bytes], None] | None = None
        self._error = pool.tools.error
        self._is_reused = self._is_paused = self._is_counted = False
        self.transport: asyncio.Transport | None = None
        self._chunks = self._bytes = 0
        self._feed: Callable[[bytes], None] = _nobody
        self.idle_since = 0.0

    # --- the transport -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self.transport = cast(asyncio.Transport, transport)
        self._pool.links.add(self)

    def begin(self, leg: Leg) -> None:
        """Send a leg's request; the connection is the leg's until its answer is complete."""
        self._leg, leg.link = leg, self
        self._sink = None
        self._is_complete = self._is_head_done = self._is_lasting = self._is_mid_chunk = self._is_counted = False
        self._begun, self._begun_at = 0, self._pool.now()
        self._tail = b""
        # A parser costs 0.2 us; a fresh one per answer cannot carry anything over from the one before.
        self._parser: ResponseParser | None = self._pool.tools.response(self)
        self._feed = self._parser.feed_data
        if self.transport is not None:
            data = b"".join(leg.parts)  # one copy costs less than a second buffer in one system call
            self.transport.write(data)

    def relay_to(self, sink: Callable[[bytes], None], already: int) -> None:
        """From now on, hand each piece of the answer to ``sink``; ``already`` bytes were passed on by its owner."""
        self._sink, self._is_counted = sink, True
        self._chunks, self._bytes = 1, already

    def discard(self) -> None:
        """From now on, read the answer to its end and throw it away."""
        self._sink = _nobody

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._leg is None:
            self._drop_idle()
            return
        try:
            self._feed(data)
        except self._error as error:
            self._fail(f"it sent what is not an HTTP answer: {error}")
            return
        self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        sink = self._sink
        if sink is None or self._is_complete:
            self._collect(data)
            return
        sink(data)
        self._tail = data
        self._chunks += 1
        self._bytes += len(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._pool.links.discard(self)
        leg, self.transport = self._leg, None
        if leg is None:
            self._pool.idle_lost(self)
        elif leg.is_until_close and exc is None:
            self._is_complete = True
            self._end(b"")
        elif self._is_stale(leg):
            self._forget()
            leg.link = None
            self._pool.on_idle_lost()
            self._pool.send_fresh(leg)
        else:
            self._fail(f"the connection broke ({exc or 'closed by the engine'})")

    def _is_stale(self, leg: Leg) -> bool:
        """The engine closed this connection while it was idle, and the request crossed that on its way."""
        is_fresh_loss = self._pool.now() - self._begun_at < STALE_S
        return self._is_reused and is_fresh_loss and not self._is_head_done and not leg.held

    # --- the parser ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Called by the parser; a second time when bytes follow the answer."""
        self._begun += 1

    def on_headers_complete(self) -> None:
        """Called by the parser, which forgets the answer's framing when the answer is complete."""
        self._is_head_done = True
        self._is_lasting = self._parser is not None and self._parser.should_keep_alive()

    def on_chunk_header(self) -> None:
        """Called by the parser."""
        self._is_mid_chunk = True

    def on_chunk_complete(self) -> None:
        """Called by the parser."""
        self._is_mid_chunk = False

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._is_complete = True

    # --- answers -------------------------------------------------------------------------------------------------

    def is_at_boundary(self) -> bool:
        """Whether another chunk may follow what was relayed last."""
        return not self._is_mid_chunk and self._tail.endswith(b"\r\n")

    def harvest(self) -> bool:
        """Move what was counted since the last call to the metrics; whether anything was."""
        chunks, self._chunks = self._chunks, 0
        if chunks and self._is_counted:
            metrics = self._pool.metrics
            metrics.relayed_chunks += chunks
            metrics.relayed_bytes += self._bytes
        self._bytes = 0
        return chunks > 0

    def pause(self) -> None:
        """Read no more for now."""
        if self.transport is not None and not self._is_paused:
            self._is_paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._is_paused:
            self._is_paused = False
            if self.transport is not None and not self.transport.is_closing():
                self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once and forget the leg."""
        self._forget()
        if self.transport is not None:
            self.transport.abort()

    def _collect(self, data: bytes) -> None:
        """The slow path: the head, the first and the last piece of a body, and answers that are held."""
        if self._begun > 1:
            self._fail("it sent bytes after the end of its answer")
        elif self._is_complete:
            self._end(data)
        else:
            self._hold(data, is_complete=False)

    def _hold(self, data: bytes, *, is_complete: bool) -> None:
        leg = self._leg
        if leg is None:
            return
        leg.held = leg.held + data if leg.held else data
        self._tail = data
        if len(leg.held) > _HELD_LIMIT:
            self._fail(f"its answer is longer than {_HELD_LIMIT} bytes")
        elif self._is_head_done and (leg.head_end or self._read_head(leg)):
            leg.owner.leg_received(leg, is_complete=is_complete)

    def _read_head(self, leg: Leg) -> bool:
        leg.head_end = leg.held.find(END_OF_HEAD) + len(END_OF_HEAD)
        leg.status = self._parser.get_status_code() if self._parser is not None else 0
        leg.parts = []
        if not self._is_lasting:
            leg.is_until_close = _FRAMED.search(leg.held, 0, leg.head_end) is None
        if leg.status < 200 or leg.head_end < len(END_OF_HEAD):
            self._fail(f"it answered with HTTP status {leg.status}")
            return False
        return True

    def _end(self, data: bytes) -> None:
        leg, sink = self._leg, self._sink
        if leg is None:
            return
        if sink is not None:
            if data:
                sink(data)
                self._chunks += 1
                self._bytes += len(data)
        else:
            self._hold(data, is_complete=True)
            if self._leg is not leg:  # failed, or aborted by its owner
                return
        self._release()
        leg.link = None
        leg.owner.leg_done(leg)

    def _release(self) -> None:
        transport, leg = self.transport, self._leg
        can_stay = self._is_lasting and leg is not None and not leg.is_http10
        self.resume()
        self._forget()
        if transport is None or transport.is_closing():
            return
        if can_stay:
            self._is_reused = True
            self._pool.put(self)
        else:
            transport.close()

    def _fail(self, reason: str) -> None:
        leg = self._leg
        self.abort()
        if leg is not None:
            leg.owner.leg_failed(leg, Failure(reason, is_connection=True))

    def _forget(self) -> None:
        self.harvest()
        self._leg = self._sink = self._parser = None
        self._feed = _nobody  # the parser refers to this object: no cycle is left behind
        self.idle_since = 0.0

    def _drop_idle(self) -> None:
        self._pool.idle_lost(self)
        if self.transport is not None:
            self.transport.abort()


def _nobody(data: bytes) -> None:
    """Takes bytes that nobody wants."""
