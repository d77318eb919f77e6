"""One request of the Conductor's own to an engine, awaited."""

from __future__ import annotations

import asyncio

from mooncake_conductor.dialects import Probe
from mooncake_conductor.proxy._httptools import read_answer
from mooncake_conductor.proxy._pool import EnginePool
from mooncake_conductor.proxy._upstream import Failure, Leg
from mooncake_plugins.errors import ConductorError


class NoAnswerError(ConductorError):
    """An engine did not answer a probe."""

    retryable = True


class _Waiter:
    """Implements `LegOwner`: keeps the answer until it is complete."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def leg_received(self, leg: Leg, *, is_complete: bool) -> None:
        """See `LegOwner`."""
        if is_complete and not self.answer.done():
            self.answer.set_result(leg.held)

    def leg_done(self, leg: Leg) -> None:
        """See `LegOwner`."""

    def leg_failed(self, leg: Leg, failure: Failure) -> None:
        """See `LegOwner`."""
        if not self.answer.done():
            self.answer.set_exception(NoAnswerError(failure.reason))


async def fetch(pool: EnginePool, probe: Probe, *, timeout_s: float) -> tuple[int, bytes]:
    """Send a probe; returns status and body.

    Raises:
        NoAnswerError: No complete answer came in time.
    """
    waiter = _Waiter()
    leg = Leg(pool, waiter, pool.probe(probe.method, probe.path, probe.body))
    pool.send(leg)
    try:
        async with asyncio.timeout(timeout_s):
            raw = await waiter.answer
    except TimeoutError as error:
        raise NoAnswerError(f"no answer to {probe.method} {probe.path} in {timeout_s:g} s") from error
    finally:
        leg.abort()
    return read_answer(pool.tools, raw)
