"""Answers that the Conductor makes itself, in the form of the OpenAI API."""

from __future__ import annotations

from http import HTTPStatus

import msgspec

from mooncake_conductor.dialects import BodyError


class ApiError(Exception):
    """A request that is answered with an error body: ``{"error": {"message", "type", "param", "code"}}``."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.allow = ""

    @classmethod
    def of(cls, error: BodyError) -> ApiError:
        """A body that cannot be accepted."""
        return cls(400, str(error), error.code, error.param)

    def body(self) -> bytes:
        """The JSON body."""
        kind = "invalid_request_error" if self.status < 500 else "timeout" if self.status == 504 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code or self.status}
        return msgspec.json.encode({"error": error})

    def event(self) -> bytes:
        """The error as the last event of a stream, and the end of its chunked body."""
        event = b"data: %b\n\n" % self.body()
        return b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)


def not_found(path: str) -> ApiError:
    """404 for a path."""
    return ApiError(404, f"There is nothing at {path}.", "not_found")


def wrong_method(method: str, path: str, allowed: str) -> ApiError:
    """405 for a method."""
    error = ApiError(405, f"{path} takes {allowed}, not {method}.", "method_not_allowed")
    error.allow = allowed
    return error


def unknown_model(model: str) -> ApiError:
    """404 for a model."""
    return ApiError(404, f"The model {model!r} does not exist.", "model_not_found", "model")


def too_large(limit: int) -> ApiError:
    """413 for a body."""
    return ApiError(413, f"The request body is larger than {limit} bytes.", "body_too_large")


def render_error(error: ApiError, *, close: bool) -> bytes:
    """The whole HTTP answer."""
    extra = {"allow": error.allow} if error.allow else {}
    if error.status == 503:
        extra["retry-after"] = "1"
    return render(error.status, error.body(), close=close, **extra)


def render(status: int, body: bytes, *, close: bool, kind: str = "application/json", **headers: str) -> bytes:
    """One HTTP answer; ``headers`` are given with underscores or hyphens."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Error"
    lines = [f"HTTP/1.1 {status} {phrase}", f"content-type: {kind}", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if close:
        lines.append("connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
