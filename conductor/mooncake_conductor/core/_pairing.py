"""From a request and the cluster to the engines that serve it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import Final, NamedTuple

from mooncake_conductor.core._cluster import Engine, Pools
from mooncake_conductor.core._facts import RequestFacts, Role
from mooncake_conductor.core._policy import SchedulingPolicy


class Fallback:
    """Why a request was not split although it might have been: `Pair.reason` besides ``RequestFacts.whole``."""

    NO_PREFILL: Final = "no_prefill"
    """No prefill engine is usable; the decode engine computes the prompt itself."""
    PREFILL_FAILED: Final = "prefill_failed"
    """Prefill engines failed for this request and none is left."""
    SINGLE_ENGINE: Final = "single_engine"
    """The only engine left can do both, and works alone."""


class Pair(NamedTuple):
    """The decision.

    Attributes:
        prefill: Engine of the prefill leg; None when the request is served by one engine.
        decode: Engine that answers.
        reason: Why there is no prefill leg; empty when there is one, and for engines that always work alone.
    """

    prefill: Engine | None
    decode: Engine
    reason: str = ""


def decide(
    facts: RequestFacts,
    pools: Pools,
    policy: SchedulingPolicy,
    now: float,
    rng: Random,
    failed: Collection[Engine] = (),
) -> Pair | None:
    """Choose the engines of one request.

    Args:
        facts: The request.
        pools: Usable engines for its model.
        policy: Chooses among those that fit.
        now: Seconds on the Conductor's monotonic clock.
        rng: Source of all randomness.
        failed: Engines that failed for this request already; never chosen.

    Returns:
        None when nobody can answer.
    """
    if failed:
        pools = Pools(*(tuple(e for e in pool if e not in failed) for pool in pools))
    if not pools.alone:
        return None
    if facts.whole is None and pools.decode:
        if pools.prefill:
            return _split(facts, pools, policy, now, rng)
        reason = Fallback.PREFILL_FAILED if any(e.can_prefill for e in failed) else Fallback.NO_PREFILL
        return _alone(facts, pools.alone, policy, now, rng, reason)
    return _alone(facts, pools.alone, policy, now, rng, facts.whole or "")


def _split(facts: RequestFacts, pools: Pools, policy: SchedulingPolicy, now: float, rng: Random) -> Pair:
    prefill, decode = policy.place(facts, pools.prefill, pools.decode, now, rng)
    return Pair(prefill, decode, "" if prefill else Fallback.SINGLE_ENGINE)


def _alone(
    facts: RequestFacts, engines: Sequence[Engine], policy: SchedulingPolicy, now: float, rng: Random, reason: str
) -> Pair:
    engine = policy.pick(facts, Role.COUPLED, engines, now, rng)
    return Pair(None, engine, "" if engine.role is Role.COUPLED else reason)
