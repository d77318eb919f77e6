"""Counters that many threads add to."""

from __future__ import annotations

import threading

NAMES = (
    "batches_submitted",
    "batches_done",
    "batches_failed",
    "batches_cancelled",
    "bytes_read",
    "bytes_written",
    "bytes_served_read",
    "bytes_served_write",
    "ranges_submitted",
    "works_submitted",
    "connects",
    "retries",
    "refused_requests",
    "integrity_failures",
    "grants_made",
    "grants_fenced",
    "grants_quarantined",
)


class Counters:
    """Named sums; all known names exist from the start, so that a metric never appears late."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, int] = dict.fromkeys(NAMES, 0)

    def add(self, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._values[name] = self._values.get(name, 0) + amount

    def values(self) -> dict[str, int]:
        """A copy of all."""
        with self._lock:
            return dict(self._values)
