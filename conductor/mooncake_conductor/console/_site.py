"""The console's port: ``/metrics``, ``/health`` and ``/state``, for operators."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from mooncake_conductor.console._prometheus import Renderer
from mooncake_conductor.core import ClusterView
from mooncake_conductor.proxy._client import ClientConnection
from mooncake_conductor.proxy._errors import ApiError, not_found, render, wrong_method
from mooncake_conductor.proxy._httptools import HttpTools
from mooncake_conductor.proxy._metrics import Metrics
from mooncake_conductor.proxy._options import ProxyOptions
from mooncake_conductor.proxy._request import Request

logger = logging.getLogger(__name__)


class Console:
    """Implements `Site`. With a key, everything but ``/health`` needs ``Authorization: Bearer KEY``."""

    def __init__(
        self,
        metrics: Metrics,
        view: ClusterView,
        engines: Callable[[], list[dict[str, Any]]],
        tools: HttpTools,
        options: ProxyOptions,
        key: bytes,
    ) -> None:
        self.tools, self.options, self.is_draining = tools, options, False
        self.clients: set[ClientConnection] = set()
        self._metrics, self._view, self._engines = metrics, view, engines
        self._credentials = b"Bearer " + key if key else b""
        self._renderer = Renderer(metrics, view)
        self._pages = {b"/metrics": self._show_metrics, b"/health": self._show_health, b"/state": self._show_state}

    def handle(self, client: ClientConnection, request: Request) -> None:
        """See `Site`."""
        try:
            client.answer(self._page(client, request))
        except ApiError as error:
            client.fail(error)
        except Exception:
            logger.exception("console failed path=%s", request.path)
            client.fail(ApiError(500, "The console failed; the Conductor's log says why.", "internal_error"))

    def count_refusal(self, error: ApiError) -> None:
        """See `Site`."""

    def tick(self, now: float) -> None:
        """Apply the deadlines of connections."""
        for client in list(self.clients):
            client.tick(now)

    def _page(self, client: ClientConnection, request: Request) -> bytes:
        page = self._pages.get(request.path)
        if page is None:
            raise not_found(request.path.decode("latin-1"))
        if request.method not in (b"GET", b"HEAD"):
            raise wrong_method(request.method.decode(), request.path.decode(), "GET")
        if (
            self._credentials
            and request.path != b"/health"
            and not hmac.compare_digest(self._credentials, request.authorization)
        ):
            raise ApiError(401, "The console needs its key: Authorization: Bearer KEY.", "invalid_api_key")
        status, kind, body = page()
        return render(status, body, close=client.has_to_close, kind=kind)

    def _show_metrics(self) -> tuple[int, str, bytes]:
        return 200, self._renderer.content_type, self._renderer.render()

    def _show_health(self) -> tuple[int, str, bytes]:
        is_ready = self._view.has_pair
        body = b'{"status":"ok"}' if is_ready else b'{"status":"unavailable"}'
        return (200 if is_ready else 503), "application/json", body

    def _show_state(self) -> tuple[int, str, bytes]:
        m = self._metrics
        state = {
            "is_ready": self._view.has_pair,
            "models": sorted(self._view.models),
            "engines": self._engines(),
            "counters": {
                "requests": {f"{path} {status}": n for (path, status), n in sorted(m.requests.items())},
                "pairs": m.pairs,
                "fallbacks": dict(m.fallbacks),
                "retries": dict(m.retries),
                "leg_failures": dict(m.leg_failures),
                "cut_answers": m.cut_answers,
                "relayed_chunks": m.relayed_chunks,
                "relayed_bytes": m.relayed_bytes,
            },
        }
        return 200, "application/json", msgspec.json.encode(state)
