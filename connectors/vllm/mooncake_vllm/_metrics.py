"""The hand-off's counters in vLLM's own logs and ``/metrics``.

``mooncake_handoff_events_total{event=...}`` counts everything by name; two histograms tell how long pulls take, and
how much of that was not hidden behind the prefill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

_BUCKETS_S = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


class HandoffStats(KVConnectorStats):
    """Counts and pull durations of an interval: ``{"counts": {event: n}, "durations": [(s, exposed s), ...]}``."""

    data: dict[str, Any]

    @classmethod
    def of(cls, counts: Mapping[str, int], durations: Sequence[tuple[float, float]]) -> HandoffStats:
        return cls(data={"counts": dict(counts), "durations": list(durations)})

    def reset(self) -> None:
        self.data = {"counts": {}, "durations": []}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        counts = Counter(self.data["counts"])
        counts.update(other.data["counts"])
        self.data = {"counts": dict(counts), "durations": [*self.data["durations"], *other.data["durations"]]}
        return self

    def reduce(self) -> dict[str, int | float]:
        seconds = sorted(total for total, _ in self.data["durations"])
        median = {"pull_seconds_p50": round(seconds[len(seconds) // 2], 4)} if seconds else {}
        return {**self.data["counts"], **median}

    def is_empty(self) -> bool:
        return not self.data["counts"] and not self.data["durations"]


class HandoffPromMetrics(KVConnectorPromMetrics):
    """Registers and feeds the series."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._events = self._counter_cls(
            name="mooncake_handoff_events",
            documentation="Hand-off events by name: pulls_ok, blocks_loaded, bytes_received, checksum_mismatches, ...",
            labelnames=[*labelnames, "event"],
        )
        self._seconds = self._histogram_cls(
            name="mooncake_handoff_pull_seconds",
            documentation="From a pull's start to its report.",
            buckets=_BUCKETS_S,
            labelnames=labelnames,
        )
        self._exposed = self._histogram_cls(
            name="mooncake_handoff_exposed_seconds",
            documentation="From prefill's last announcement to a pull's report: what the transfer added.",
            buckets=_BUCKETS_S,
            labelnames=labelnames,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for event, count in transfer_stats_data["counts"].items():
            self._events.labels(*labels, event).inc(count)
        for seconds, exposed in transfer_stats_data["durations"]:
            self._seconds.labels(*labels).observe(seconds)
            self._exposed.labels(*labels).observe(exposed)
