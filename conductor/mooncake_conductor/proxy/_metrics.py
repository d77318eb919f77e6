"""Counters of the proxy: plain integers, added to on the hot path and read at a scrape. One event loop owns them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

# Seconds. Fine where routing matters, coarse where long prompts live.
TTFT_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """Counts by upper bound, as Prometheus wants them (not yet cumulative)."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Add one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Metrics:
    """Everything that is counted.

    Attributes:
        requests: By endpoint path and status code; 499 is a client that left.
        fallbacks: Requests served without a prefill leg, by reason.
        retries: Further attempts, by what failed (``prefill`` or ``decode``).
        leg_failures: Failed legs, by engine.
        cut_answers: Answers that ended early after their first byte.
        pairs: Requests sent as a prefill and a decode leg.
        relayed_chunks, relayed_bytes: Pieces and bytes of answers passed on.
        ttft: Seconds from a request's last byte to the first byte of its answer.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self.leg_failures: Counter[str] = Counter()
        self.cut_answers = 0
        self.pairs = 0
        self.relayed_chunks = 0
        self.relayed_bytes = 0
        self.refused_connections = 0
        self.ttft = Histogram(TTFT_BOUNDS)
