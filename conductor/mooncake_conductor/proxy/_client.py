"""A client's connection: requests come in whole, answers go out as bytes.

llhttp parses in its strict mode, which refuses what request smuggling is made of (two lengths, a length beside chunked
coding, bare line feeds, folded headers). On top of it: exactly one Host header, bounded heads and bodies, a deadline to
send them, no protocol upgrade. Requests are answered in order; pipelined ones wait, and the socket is not read while
many do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol, cast

from mooncake_conductor.proxy._errors import ApiError, render_error, too_large
from mooncake_conductor.proxy._httptools import HttpTools, RequestParser
from mooncake_conductor.proxy._options import ProxyOptions
from mooncake_conductor.proxy._request import FORWARDED, Request

_PIPELINED = 16
_LINGER_S = 2.0
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_LOOKED_AT = FORWARDED.keys() | {b"authorization", b"host", b"content-length", b"content-type", b"expect"}


class Activity(Protocol):
    """Whatever is answering a client's request."""

    def cancel(self) -> None:
        """The client is gone."""

    def pause(self) -> None:
        """The client does not take bytes as fast as they come."""

    def resume(self) -> None:
        """It does again."""


class Site(Protocol):
    """What stands behind a listening port."""

    tools: HttpTools
    options: ProxyOptions
    clients: set[ClientConnection]
    is_draining: bool

    def handle(self, client: ClientConnection, request: Request) -> None:
        """Answer now, or set ``client.activity`` and answer later. Never raises."""

    def count_refusal(self, error: ApiError) -> None:
        """A request was refused before it had a path."""


class ClientConnection(asyncio.Protocol):
    """One accepted connection. Owned by the site's ``clients`` set while it is open.

    Attributes:
        activity: What is answering the current request; None between requests.
        request: The current request.
        write: Sends bytes to the client; valid while the connection is open.
        is_paused: The client is slow; whoever writes should stop reading its source.
    """

    def __init__(self, site: Site, loop: asyncio.AbstractEventLoop) -> None:
        self._site = site
        self._options = site.options
        self._now = loop.time
        self.activity: Activity | None = None
        self.is_paused = False
        self._queue: deque[Request | ApiError] = deque()
        self._is_pumping = self._is_deaf = self._is_reading_paused = False
        self._since, self._goodbye_s = loop.time(), _LINGER_S
        self._new_request()

    # --- the transport -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self.transport = cast(asyncio.Transport, transport)
        self.write = self.transport.write
        self._parser: RequestParser | None = self._site.tools.request(self)
        self._feed = self._parser.feed_data
        self._error = self._site.tools.error
        if len(self._site.clients) >= self._options.max_connections:
            self._is_deaf = True
            self.write(render_error(ApiError(503, "Too many connections.", "overloaded"), close=True))
            self.transport.close()
            return
        self._site.clients.add(self)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._is_deaf:
            return
        if not self._received:
            self._since = self._now()
        self._received += len(data)
        try:
            self._feed(data)
        except self._error as error:
            self._stop_parsing(self._refusal or ApiError(400, f"This is not HTTP/1.1: {error}.", "invalid_http"))
        else:
            if self._received > self._limit:
                self._stop_parsing(self._too_long())
        if self._queue:
            self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._site.clients.discard(self)
        self._is_deaf = True
        self._queue.clear()
        self._parser = None
        del self._feed  # it refers to the parser, which refers to this object
        activity, self.activity = self.activity, None
        if activity is not None:
            activity.cancel()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self.is_paused = True
        self._since = self._now()
        if self.activity is not None:
            self.activity.pause()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self.is_paused = False
        if self.activity is not None:
            self.activity.resume()
        elif self._queue:
            self._pump()

    # --- the parser ----------------------------------------------------------------------------------------------

    def _new_request(self) -> None:
        self._incoming = Request()
        self._url = b""
        self._body: list[bytes] = []
        self._head_bytes = self._body_bytes = self._hosts = self._received = 0
        self._limit = self._options.max_header_bytes
        self._is_in_head, self._wants_continue = True, False
        self._kind = b""
        self._refusal: ApiError | None = None

    def on_url(self, url: bytes) -> None:
        """Called by the parser, perhaps with a part."""
        self._url += url
        self._head_bytes += len(url)
        if self._head_bytes > self._options.max_header_bytes:
            self._refuse(self._too_long())

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser; also for trailers, which mean nothing here."""
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > self._options.max_header_bytes:
            self._refuse(self._too_long())
        name = name.lower()
        if name not in _LOOKED_AT or not self._is_in_head:
            return
        if name == b"host":
            self._hosts += 1
        elif name == b"content-type":
            self._kind = value
        elif name == b"content-length":
            self._body_bytes = int(value)  # llhttp has checked it
        elif name == b"expect":
            self._wants_continue = True
            if value.lower() != b"100-continue":
                self._refuse(
                    ApiError(417, f"Expectation {value.decode('latin-1')!r} is not known.", "expectation_failed")
                )
        elif name == b"authorization":
            self._incoming.authorization = value
        else:
            self._incoming.forwarded += FORWARDED[name] + value + b"\r\n"

    def on_headers_complete(self) -> None:
        """Called by the parser: decides whether the body is wanted."""
        parser, request, options = self._parser, self._incoming, self._options
        if parser is None:
            return
        version = parser.get_http_version()
        request.method, request.is_http10 = parser.get_method(), version == "1.0"
        request.keep_alive = parser.should_keep_alive() and not request.is_http10
        request.path = _path(self._url)
        request.content_type = self._kind
        self._is_in_head = False
        if parser.should_upgrade():
            self._refuse(ApiError(400, "Nothing to upgrade to: send no Upgrade header and no CONNECT.", "upgrade"))
        if version not in ("1.1", "1.0"):
            self._refuse(ApiError(505, f"HTTP/{version} is not supported.", "http_version"))
        if self._hosts > 1 or (not self._hosts and not request.is_http10):
            self._refuse(ApiError(400, "Exactly one Host header is needed.", "invalid_http"))
        if self._body_bytes > options.max_body_bytes:
            self._refuse(too_large(options.max_body_bytes))
        if self._wants_continue and self.activity is None and not self._queue:
            self.write(_CONTINUE)
        # Chunked coding may frame each byte with six more; what is beyond that is nonsense (extensions, trailers).
        self._limit += 8 * options.max_body_bytes + options.max_header_bytes
        self._body_bytes = 0

    def on_body(self, data: bytes) -> None:
        """Called by the parser with each piece."""
        self._body_bytes += len(data)
        if self._body_bytes > self._options.max_body_bytes:
            self._refuse(too_large(self._options.max_body_bytes))
        self._body.append(data)

    def on_message_complete(self) -> None:
        """Called by the parser; also between two pipelined requests."""
        request, body = self._incoming, self._body
        request.body = body[0] if len(body) == 1 else b"".join(body)
        request.received_at = self._now()
        self._queue.append(request)
        self._new_request()

    def _refuse(self, error: ApiError) -> None:
        self._refusal = error
        raise error  # leaves the parser; httptools turns it into its own error

    def _too_long(self) -> ApiError:
        if self._is_in_head:
            limit = self._options.max_header_bytes
            return ApiError(431, f"The request head is larger than {limit} bytes.", "header_too_large")
        return too_large(self._options.max_body_bytes)

    def _stop_parsing(self, error: ApiError) -> None:
        """Nothing after a refused request can be trusted: answer what came before it, then it, then close."""
        self._is_deaf = True
        self._queue.append(error)

    # --- answers -------------------------------------------------------------------------------------------------

    @property
    def has_to_close(self) -> bool:
        """The connection closes after the current answer, which should say so."""
        return not self.request.keep_alive or self._site.is_draining

    def finished(self, *, close: bool = False) -> None:
        """The current answer was written completely."""
        self.activity = None
        if close or self.has_to_close:
            self.close()
            return
        self._since = self._now()
        if self._queue:
            self._pump()

    def answer(self, data: bytes) -> None:
        """Send one complete answer and go on."""
        if self.request.method == b"HEAD":
            data = data[: data.index(b"\r\n\r\n") + 4]
        self.write(data)
        self.finished()

    def fail(self, error: ApiError) -> None:
        """Answer the current request with an error and go on."""
        self.answer(render_error(error, close=self.has_to_close))

    def close(self) -> None:
        """Close after what was written has gone out."""
        self._is_deaf, self._since, self._goodbye_s = True, self._now(), self._options.stall_s
        self._queue.clear()
        self.transport.close()

    def close_if_idle(self) -> None:
        """Close unless a request is being received or answered."""
        if self.activity is None and not self._queue and not self._received and not self._is_deaf:
            self.close()

    def abort(self) -> None:
        """Close now, so that the client sees that its answer is not complete."""
        self._is_deaf = True
        self.transport.abort()

    def _pump(self) -> None:
        if self._is_pumping:  # an answer that was made at once: the loop below goes on
            return
        self._is_pumping = True
        try:
            while self._queue and self.activity is None and not self.is_paused and not self.transport.is_closing():
                self._next(self._queue.popleft())
        finally:
            self._is_pumping = False
        self._throttle()

    def _next(self, item: Request | ApiError) -> None:
        if isinstance(item, ApiError):
            self._site.count_refusal(item)
            self._linger(render_error(item, close=True))
        else:
            self.request = item
            self._site.handle(self, item)

    def _linger(self, data: bytes) -> None:
        """Answer and half-close, but read on for a moment: closing with unread bytes would destroy the answer."""
        self.write(data)
        self._queue.clear()
        self._since, self._goodbye_s = self._now(), _LINGER_S
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _throttle(self) -> None:
        wants_pause = len(self._queue) > _PIPELINED and not self._is_deaf
        if wants_pause != self._is_reading_paused and not self.transport.is_closing():
            self._is_reading_paused = wants_pause
            if wants_pause:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def tick(self, now: float) -> None:
        """Apply the deadlines of a connection that is not waiting for an engine. Called a few times a second."""
        waited = now - self._since
        if self.is_paused:
            if waited > self._options.stall_s:
                self.abort()
        elif self.activity is not None:
            return
        elif self._is_deaf:
            if waited > self._goodbye_s:
                self.abort()
        elif self._received == 0:
            if waited > self._options.keep_alive_s:
                self.close()
        elif waited > (self._options.receive_s / 10 if self._is_in_head else self._options.receive_s):
            self._stop_parsing(ApiError(408, "The request did not arrive in time.", "request_timeout"))
            self._pump()


def _path(target: bytes) -> bytes:
    """The path of a request target: without the query, and without the origin that clients may write for proxies."""
    path = target.partition(b"?")[0]
    if path.startswith(b"http://"):
        return b"/" + path[7:].partition(b"/")[2]
    return path
