"""Waiting for something to become true, with a deadline and without a guess how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Return as soon as ``condition()`` is true.

    Raises:
        AssertionError: It did not become true in time; says ``what`` was waited for.
    """
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"waited {timeout_s} s in vain for: {what}")
        time.sleep(0.002)
