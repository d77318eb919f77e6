"""The OpenAI-compatible port: what each path does, and what all requests share."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection
from random import Random

from mooncake_conductor.core import ClusterView, Engine, Pair, RequestFacts, SchedulingPolicy, TrafficFailed, decide
from mooncake_conductor.dialects import BodyError, Endpoint, EngineDialect, parse_body
from mooncake_conductor.proxy._client import ClientConnection
from mooncake_conductor.proxy._errors import ApiError, not_found, render, unknown_model, wrong_method
from mooncake_conductor.proxy._exchange import Exchange
from mooncake_conductor.proxy._httptools import HttpTools
from mooncake_conductor.proxy._metrics import Metrics
from mooncake_conductor.proxy._options import ProxyOptions
from mooncake_conductor.proxy._pool import EnginePool
from mooncake_conductor.proxy._request import Request
from mooncake_conductor.proxy._upstream import Failure
from mooncake_plugins.handoff import Ticket, sign_ticket

logger = logging.getLogger(__name__)

Handler = Callable[[ClientConnection, Request], None]


class Frontend:
    """Handles requests of clients. Implements `Site`; one per Conductor worker, used by its event loop only.

    Attributes:
        active: Exchanges that are not over.
        pools: Connections to each engine.
    """

    def __init__(
        self,
        view: ClusterView,
        policy: SchedulingPolicy,
        dialect: EngineDialect,
        *,
        tools: HttpTools,
        options: ProxyOptions,
        metrics: Metrics,
        key: bytes,
        now: Callable[[], float],
        rng: Random,
    ) -> None:
        self.view, self.policy, self.dialect = view, policy, dialect
        self.tools, self.options, self.metrics = tools, options, metrics
        self.now, self._rng, self._key = now, rng, key
        self.pools: dict[Engine, EnginePool] = {}
        self.clients: set[ClientConnection] = set()
        self.active: set[Exchange] = set()
        self.is_draining = False
        self.on_failure: Callable[[Engine, TrafficFailed], None] = lambda engine, event: None
        self.list_models: Callable[[], bytes] = lambda: b'{"object":"list","data":[]}'
        self._routes: dict[bytes, tuple[bytes, Handler]] = {
            b"/v1/completions": (b"POST", self._completions),
            b"/v1/chat/completions": (b"POST", self._chat),
            b"/v1/models": (b"GET", self._models),
            b"/health": (b"GET", self._health),
        }

    # --- Site ----------------------------------------------------------------------------------------------------

    def handle(self, client: ClientConnection, request: Request) -> None:
        """See `Site`."""
        route = self._routes.get(request.path)
        try:
            if route is None:
                raise not_found(request.path.decode("latin-1"))
            if request.method != route[0] and (request.method, route[0]) != (b"HEAD", b"GET"):
                raise wrong_method(request.method.decode(), request.path.decode(), route[0].decode())
            route[1](client, request)
        except BodyError as error:
            self._refuse(client, request, ApiError.of(error))
        except ApiError as error:
            self._refuse(client, request, error)
        except Exception:
            logger.exception("request failed inside the conductor path=%s", request.path)
            self._refuse(client, request, ApiError(500, "The Conductor failed; its log says why.", "internal_error"))

    def count_refusal(self, error: ApiError) -> None:
        """See `Site`."""
        self.metrics.requests["-", error.status] += 1

    def _refuse(self, client: ClientConnection, request: Request, error: ApiError) -> None:
        path = request.path.decode() if request.path in self._routes else "-"
        self.metrics.requests[path, error.status] += 1
        client.activity = None
        client.fail(error)

    # --- paths ---------------------------------------------------------------------------------------------------

    def _completions(self, client: ClientConnection, request: Request) -> None:
        self._schedule(client, request, Endpoint.COMPLETIONS)

    def _chat(self, client: ClientConnection, request: Request) -> None:
        self._schedule(client, request, Endpoint.CHAT)

    def _schedule(self, client: ClientConnection, request: Request, endpoint: Endpoint) -> None:
        kind = request.content_type
        if kind != b"application/json" and kind.partition(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "The Content-Type must be application/json.", "unsupported_media_type")
        body = parse_body(request.body)
        facts = self.dialect.facts(endpoint, body)
        pair = self.decide(facts, ())
        if pair is None:
            raise self._nobody(facts.model)
        exchange = Exchange(self, client, request, endpoint, body, facts)
        exchange.start(pair)
        client.activity = exchange
        self.active.add(exchange)

    def _nobody(self, model: str) -> ApiError:
        if self.view.pools(model) is None and self.view.models:
            return unknown_model(model)
        return ApiError(503, "No engine is ready for this request; try again later.", "no_engine")

    def _models(self, client: ClientConnection, request: Request) -> None:
        self._answer(client, request, 200, self.list_models())

    def _health(self, client: ClientConnection, request: Request) -> None:
        if self.view.has_pair and not self.is_draining:
            self._answer(client, request, 200, b'{"status":"ok"}')
        else:
            self._answer(client, request, 503, b'{"status":"unavailable"}')

    def _answer(self, client: ClientConnection, request: Request, status: int, body: bytes) -> None:
        self.metrics.requests[request.path.decode(), status] += 1
        client.answer(render(status, body, close=client.has_to_close))

    # --- for exchanges -------------------------------------------------------------------------------------------

    def decide(self, facts: RequestFacts, failed: Collection[Engine]) -> Pair | None:
        """Engines for a request, or None."""
        pools = self.view.pools(facts.model)
        return None if pools is None else decide(facts, pools, self.policy, self.now(), self._rng, failed)

    def issue_ticket(self, prefill: Engine) -> str:
        """A fresh signed ticket for one hand-off."""
        expires_at = time.time() + self.options.ticket_s
        return sign_ticket(Ticket(secrets.token_hex(16), prefill.instance, prefill.addresses, expires_at), self._key)

    def note_failure(self, engine: Engine, failure: Failure) -> None:
        """A leg failed; health checking hears of it."""
        self.metrics.leg_failures[engine.name] += 1
        logger.warning("leg failed engine=%s reason=%s", engine.name, failure.reason)
        self.on_failure(engine, TrafficFailed(failure.reason, failure.is_connection))

    # --- the clock -----------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Apply all deadlines."""
        now = self.now()
        for exchange in list(self.active):
            exchange.tick(now)
        for client in list(self.clients):
            client.tick(now)
        for pool in self.pools.values():
            pool.tick(now)
