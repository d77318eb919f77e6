"""One request of a client, received completely."""

from __future__ import annotations

from typing import Final

# Besides Authorization, the only headers that reach an engine. A list of what passes is safe where a list of what does
# not is a race with other people's parsers.
FORWARDED: Final[dict[bytes, bytes]] = {
    b"x-request-id": b"x-request-id: ",
    b"traceparent": b"traceparent: ",
    b"tracestate": b"tracestate: ",
}


class Request:
    """Method, path, forwarded headers, body.

    Attributes:
        path: Without the query.
        forwarded: Ready header lines for the engine.
        authorization: Value of that header.
        content_type: Value of that header.
        keep_alive: The client's connection stays open after the answer.
        is_http10: The client cannot take a chunked answer.
        received_at: Loop time of the last byte.
    """

    __slots__ = (
        "authorization",
        "body",
        "content_type",
        "forwarded",
        "is_http10",
        "keep_alive",
        "method",
        "path",
        "received_at",
    )

    def __init__(self) -> None:
        self.method = b""
        self.path = b""
        self.forwarded = b""
        self.authorization = b""
        self.body = b""
        self.content_type = b""
        self.keep_alive = True
        self.is_http10 = False
        self.received_at = 0.0
