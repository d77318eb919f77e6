"""The one module that imports prometheus_client. Metrics are rendered from plain counters when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from mooncake_conductor.core import ClusterView
from mooncake_conductor.proxy._metrics import Histogram, Metrics
from mooncake_plugins.errors import ProviderUnavailableError

PREFIX = "mooncake_conductor_"


class Renderer:
    """Renders the metrics of one worker.

    Raises:
        ProviderUnavailableError: prometheus_client is not installed.
    """

    def __init__(self, metrics: Metrics, view: ClusterView) -> None:
        try:
            from prometheus_client import CollectorRegistry, core, exposition
        except ImportError as error:
            remedy = "pip install 'mooncake-plugins[conductor]'"
            raise ProviderUnavailableError("conductor", "prometheus_client", "it is not installed", remedy) from error
        self._metrics, self._view, self._core = metrics, view, core
        self._registry, self._generate = CollectorRegistry(auto_describe=False), exposition.generate_latest
        self.content_type: str = exposition.CONTENT_TYPE_PLAIN_0_0_4
        self._registry.register(self)

    def render(self) -> bytes:
        """The text format."""
        return self._generate(self._registry)

    def collect(self) -> Iterable[Any]:
        """Called by prometheus_client."""
        m = self._metrics
        requests: dict[tuple[str, ...], int] = {(path, str(status)): n for (path, status), n in m.requests.items()}
        yield self._counter(
            "requests", "Requests answered, by path and status; 499: the client left.", ["path", "status"], requests
        )
        yield self._counter("pairs", "Times a request was sent as a prefill and a decode leg.", [], {(): m.pairs})
        yield self._counter("fallbacks", "Requests served without a prefill leg.", ["reason"], _keyed(m.fallbacks))
        yield self._counter("retries", "Further attempts, by the leg that failed.", ["leg"], _keyed(m.retries))
        yield self._counter("leg_failures", "Failed legs.", ["engine"], _keyed(m.leg_failures))
        yield self._counter("cut_answers", "Answers that ended early after their first byte.", [], {(): m.cut_answers})
        yield self._counter("relayed_chunks", "Pieces of answers passed on.", [], {(): m.relayed_chunks})
        yield self._counter("relayed_bytes", "Bytes of answers passed on.", [], {(): m.relayed_bytes})
        yield self._gauge(
            "engine_in_flight", "Legs sent and not ended.", {e.name: e.in_flight for e in self._view.engines.values()}
        )
        yield self._gauge(
            "engine_up", "1: takes requests.", {e.name: int(e.is_usable) for e in self._view.engines.values()}
        )
        yield self._histogram("ttft_seconds", "From a request's last byte to the first byte of its answer.", m.ttft)

    def _counter(self, name: str, text: str, labels: list[str], values: dict[tuple[str, ...], int]) -> Any:
        family = self._core.CounterMetricFamily(PREFIX + name, text, labels=labels)
        for key, value in sorted(values.items()):
            family.add_metric(key, value)
        return family

    def _gauge(self, name: str, text: str, values: dict[str, int]) -> Any:
        family = self._core.GaugeMetricFamily(PREFIX + name, text, labels=["engine"])
        for key, value in values.items():
            family.add_metric([key], value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Any:
        bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family = self._core.HistogramMetricFamily(PREFIX + name, text)
        family.add_metric([], buckets, histogram.total)
        return family


def _keyed(values: dict[str, int]) -> dict[tuple[str, ...], int]:
    return {(key,): value for key, value in values.items()}
