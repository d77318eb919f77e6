"""Decisions of the Conductor. Pure: no socket, no thread, no clock, no logging; time and randomness are passed in."""

from __future__ import annotations

from mooncake_conductor.core._cluster import ClusterView, Engine, Pools
from mooncake_conductor.core._facts import RequestFacts, Role
from mooncake_conductor.core._health import (
    Action,
    Described,
    DescribeFailed,
    Event,
    Health,
    HealthMachine,
    HealthOptions,
    Probed,
    Refused,
    TrafficFailed,
    Verify,
)
from mooncake_conductor.core._pairing import Fallback, Pair, decide
from mooncake_conductor.core._policy import LeastLoaded, Placement, RoundRobin, SchedulingPolicy

__all__ = [
    "Action",
    "ClusterView",
    "DescribeFailed",
    "Described",
    "Engine",
    "Event",
    "Fallback",
    "Health",
    "HealthMachine",
    "HealthOptions",
    "LeastLoaded",
    "Pair",
    "Placement",
    "Pools",
    "Probed",
    "Refused",
    "RequestFacts",
    "Role",
    "RoundRobin",
    "SchedulingPolicy",
    "TrafficFailed",
    "Verify",
    "decide",
]
