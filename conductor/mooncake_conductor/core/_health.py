"""Whether an engine may be used: a state machine fed with probes, failures in traffic and descriptions.

    JOINING ──Described──▶ UP ──`fall` failures in a row──▶ DOWN ──`rise` good probes──▶ describe ──Described──▶ UP
       │                   │ connection lost: SUSPECT, probed and described at once          │
       └──────Refused──────┴──────────────────▶ REFUSED ◀──────────────Refused───────────────┘

Only UP takes requests. An engine whose connections broke may be another process when it answers again: its instance id
and addresses are in every ticket, so it is described again before it is used. REFUSED (wrong fingerprint, role or
version) is asked again from time to time, because only a restart of the engine can cure it. Hysteresis: one lost probe
changes nothing, one good probe brings nothing back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Health(Enum):
    """States."""

    JOINING = "joining"
    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Probed:
    """A health probe ended."""

    is_ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TrafficFailed:
    """A request failed on this engine. ``is_connection``: it could not be reached, or the connection broke."""

    reason: str
    is_connection: bool


@dataclass(frozen=True, slots=True)
class Verify:
    """Something hints that the engine process may have changed (idle connections ended early)."""


@dataclass(frozen=True, slots=True)
class Described:
    """The engine said what it is, and fits."""


@dataclass(frozen=True, slots=True)
class DescribeFailed:
    """The engine did not answer the describe probe."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine said what it is, and does not fit."""

    reason: str


Event = Probed | TrafficFailed | Verify | Described | DescribeFailed | Refused


class Action(Enum):
    """What the shell has to do."""

    PROBE = "probe"
    DESCRIBE = "describe"
    USE = "use"
    AVOID = "avoid"


@dataclass(frozen=True, slots=True)
class HealthOptions:
    """Thresholds.

    Attributes:
        fall: Failures in a row that take an engine out.
        rise: Good probes in a row before it is described and used again.
        redescribe_s: Seconds between descriptions of an engine that is UP and hinted at, or REFUSED.
    """

    fall: int = 2
    rise: int = 2
    redescribe_s: float = 10.0


class HealthMachine:
    """State of one engine. Pure: `handle` returns what to do."""

    def __init__(self, options: HealthOptions) -> None:
        self._options = options
        self.state = Health.JOINING
        self.reason = "not described yet"
        self._bad = 0
        self._good = 0
        self._wants_description = True
        self._described_at = float("-inf")

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; ``now`` is monotonic seconds."""
        match event:
            case Probed(is_ok=True):
                return self._on_good(now)
            case Probed(reason=reason):
                return self._on_bad(reason)
            case TrafficFailed(reason=reason, is_connection=True):
                return self._on_connection_failure(reason)
            case TrafficFailed(reason=reason):
                return [Action.PROBE] if self.state is Health.UP else []
            case Verify():
                self._wants_description = True
                return []
            case Described():
                self._described_at, self._wants_description = now, False
                return self._enter(Health.UP, "")
            case DescribeFailed(reason=reason):
                return self._on_describe_failed(reason)
            case Refused(reason=reason):
                self._described_at, self._wants_description = now, True
                return self._enter(Health.REFUSED, reason)

    def _on_good(self, now: float) -> list[Action]:
        self._bad, self._good = 0, self._good + 1
        is_due = now - self._described_at >= self._options.redescribe_s
        wants = {
            Health.JOINING: True,
            Health.SUSPECT: True,
            Health.DOWN: self._good >= self._options.rise,
            Health.UP: self._wants_description and is_due,
            Health.REFUSED: is_due,
        }
        return [Action.DESCRIBE] if wants[self.state] else []

    def _on_bad(self, reason: str) -> list[Action]:
        self._good, self._bad = 0, self._bad + 1
        if self.state in (Health.JOINING, Health.DOWN):
            self.reason = reason
            return []
        return self._enter(Health.DOWN, reason) if self._bad >= self._options.fall else []

    def _on_connection_failure(self, reason: str) -> list[Action]:
        if self.state is not Health.UP:
            return []
        self._bad += 1
        return [*self._enter(Health.SUSPECT, reason), Action.PROBE]

    def _on_describe_failed(self, reason: str) -> list[Action]:
        if self.state is Health.UP:
            self._wants_description = True
        return self._on_bad(f"describe failed: {reason}")

    def _enter(self, state: Health, reason: str) -> list[Action]:
        was_usable, self.state, self.reason = self.state is Health.UP, state, reason
        if state is Health.UP:
            self._bad = 0
            return [Action.USE]
        self._good = 0
        return [Action.AVOID] if was_usable else []
