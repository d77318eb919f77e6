"""The one module that imports httptools (llhttp, the HTTP parser of Node.js)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from mooncake_plugins.errors import ProviderUnavailableError

EXTRA_REMEDY = "pip install 'mooncake-plugins[conductor]'"


class Parser(Protocol):
    """What is used of a parser."""

    def feed_data(self, data: bytes) -> None:
        """Parse the next bytes; calls back on the target."""

    def should_keep_alive(self) -> bool:
        """Whether the connection may carry another message after this one."""
        ...

    def get_http_version(self) -> str:
        """For instance ``1.1``."""
        ...


class RequestParser(Parser, Protocol):
    """Parses requests: ``on_url``, ``on_header``, ``on_headers_complete``, ``on_body``, ``on_message_complete``."""

    def get_method(self) -> bytes:
        """For instance ``POST``."""
        ...

    def should_upgrade(self) -> bool:
        """Whether the client asks for another protocol; true from ``on_headers_complete`` on."""
        ...


class ResponseParser(Parser, Protocol):
    """Parses answers; only the callbacks that the target has are called."""

    def get_status_code(self) -> int:
        """For instance 200."""
        ...


class RequestParserFactory(Protocol):
    """Makes a request parser for one connection."""

    def __call__(self, protocol: object) -> RequestParser:
        """``protocol``: target of the callbacks."""
        ...


class ResponseParserFactory(Protocol):
    """Makes a response parser for one answer."""

    def __call__(self, protocol: object) -> ResponseParser:
        """``protocol``: target of the callbacks."""
        ...


class HttpTools(NamedTuple):
    """The parsers and their exception."""

    request: RequestParserFactory
    response: ResponseParserFactory
    error: type[Exception]


def load_httptools() -> HttpTools:
    """Import httptools.

    Raises:
        ProviderUnavailableError: It is not installed.
    """
    try:
        import httptools
    except ImportError as error:
        raise ProviderUnavailableError("conductor", "httptools", "it is not installed", EXTRA_REMEDY) from error
    return HttpTools(
        httptools.HttpRequestParser,
        httptools.HttpResponseParser,
        httptools.HttpParserError,
    )


class _Collector:
    def __init__(self) -> None:
        self.body: list[bytes] = []
        self.on_body = self.body.append


def read_answer(tools: HttpTools, raw: bytes) -> tuple[int, bytes]:
    """Status and body of one complete answer, given as it came over the wire."""
    collector = _Collector()
    parser = tools.response(collector)
    parser.feed_data(raw)
    return parser.get_status_code(), b"".join(collector.body)
