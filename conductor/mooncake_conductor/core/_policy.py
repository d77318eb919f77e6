"""How an engine, or a pair of them, is chosen among those that could serve a request.

`decide` filters (health, model, what a request needs, what failed already) and asks the policy to choose among the
rest. Simple policies implement `pick`; policies that weigh both legs together override `place`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random
from typing import ClassVar, NamedTuple

from mooncake_conductor.core._cluster import Engine
from mooncake_conductor.core._facts import RequestFacts, Role


class Placement(NamedTuple):
    """Where the two legs of a request go; ``prefill`` is None when one engine serves it alone."""

    prefill: Engine | None
    decode: Engine


class SchedulingPolicy(ABC):
    """Chooses engines. One object per Conductor worker; it may keep state. No I/O, no clock, no global randomness."""

    name: ClassVar[str]

    @abstractmethod
    def pick(self, facts: RequestFacts, role: Role, candidates: Sequence[Engine], now: float, rng: Random) -> Engine:
        """Choose one engine.

        Args:
            facts: The request.
            role: What it is wanted for: PREFILL, DECODE, or COUPLED for a whole request.
            candidates: Usable engines, at least one. Not changed.
            now: Seconds on the Conductor's monotonic clock.
            rng: Source of all randomness.
        """

    def place(
        self, facts: RequestFacts, prefill: Sequence[Engine], decode: Sequence[Engine], now: float, rng: Random
    ) -> Placement:
        """Choose both legs of a request that may be split; ``prefill`` and ``decode`` are not empty.

        An engine that can do both may be in both lists. It is not paired with itself unless there is no other way; then
        it works alone.
        """
        chosen = self.pick(facts, Role.DECODE, decode, now, rng)
        others = [engine for engine in prefill if engine is not chosen] if chosen.role is Role.BOTH else prefill
        if others:
            return Placement(self.pick(facts, Role.PREFILL, others, now, rng), chosen)
        rest = [engine for engine in decode if engine is not chosen]
        if rest:  # the only prefill engine was taken for decode: give it back
            return Placement(chosen, self.pick(facts, Role.DECODE, rest, now, rng))
        return Placement(None, chosen)


class LeastLoaded(SchedulingPolicy):
    """The engine with the fewest requests in flight; among equals, a random one."""

    name = "least_loaded"

    def pick(self, facts: RequestFacts, role: Role, candidates: Sequence[Engine], now: float, rng: Random) -> Engine:
        """Source: the baseline ``load balancing`` of the Mooncake paper, with requests as the load."""
        if len(candidates) == 1:
            return candidates[0]
        least = min([engine.in_flight for engine in candidates])
        best = [engine for engine in candidates if engine.in_flight == least]
        # random() and a multiplication: a fifth of the cost of randrange, on the path of every request.
        return best[0] if len(best) == 1 else best[int(rng.random() * len(best))]


class RoundRobin(SchedulingPolicy):
    """Each engine in turn, per role."""

    name = "round_robin"

    def __init__(self) -> None:
        self._turn: dict[Role, int] = {}

    def pick(self, facts: RequestFacts, role: Role, candidates: Sequence[Engine], now: float, rng: Random) -> Engine:
        """Next in the order of the command line; engines that come or go shift the turn, which evens out."""
        turn = self._turn.get(role, -1) + 1
        self._turn[role] = turn
        return candidates[turn % len(candidates)]
