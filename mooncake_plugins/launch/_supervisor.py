"""The supervisor as a state machine: events in, actions out; no process, clock or file is touched here.

Each part goes through

    WAITING ──start──▶ STARTING ──ready──▶ READY
                          │  │               │
                     late │  └──── stop ─────┤ stop
                          ▼                  ▼
                       STOPPING (SIGTERM) ──late, hurry──▶ KILLING (SIGKILL) ──late──▶ LOST

and from everywhere to GONE when its process has ended. The death of a part, or its being late, stops all the others:
nothing is restarted, because a restarted engine would silently have lost its cache and its requests. A first interrupt
stops everything, a second kills it.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

KILL_WAIT_S = 10.0
REPORT_EVERY_S = 15.0


class State(Enum):
    """Where a part is."""

    WAITING = auto()  # for the parts it needs
    STARTING = auto()
    READY = auto()
    STOPPING = auto()
    KILLING = auto()
    GONE = auto()
    LOST = auto()  # it did not even react to SIGKILL


class Cause(Enum):
    """Why a part changes its state."""

    START = auto()
    READY = auto()
    STOP = auto()
    HURRY = auto()
    LATE = auto()
    EXITED = auto()


TRANSITIONS: Mapping[tuple[State, Cause], State] = {
    (State.WAITING, Cause.START): State.STARTING,
    (State.WAITING, Cause.STOP): State.GONE,
    (State.STARTING, Cause.READY): State.READY,
    (State.STARTING, Cause.LATE): State.STOPPING,
    (State.STARTING, Cause.STOP): State.STOPPING,
    (State.STARTING, Cause.EXITED): State.GONE,
    (State.READY, Cause.STOP): State.STOPPING,
    (State.READY, Cause.EXITED): State.GONE,
    (State.STOPPING, Cause.LATE): State.KILLING,
    (State.STOPPING, Cause.HURRY): State.KILLING,
    (State.STOPPING, Cause.EXITED): State.GONE,
    (State.KILLING, Cause.LATE): State.LOST,
    (State.KILLING, Cause.EXITED): State.GONE,
    (State.LOST, Cause.EXITED): State.GONE,
}
FAILURES = {(State.STARTING, Cause.LATE), (State.STARTING, Cause.EXITED), (State.READY, Cause.EXITED)}
ENDED = {State.GONE, State.LOST}


@dataclass(frozen=True, slots=True)
class Begin:
    """Event: start the deployment."""


@dataclass(frozen=True, slots=True)
class PartReady:
    """Event: the part's ready URL answered."""

    part: str


@dataclass(frozen=True, slots=True)
class PartExited:
    """Event: all processes of the part have ended, or it could not be started (then ``reason`` says why)."""

    part: str
    returncode: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Event: the user or the system wants everything to stop."""

    source: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Event: time has passed; send one when `Supervisor.deadline` is over."""


@dataclass(frozen=True, slots=True)
class Spawn:
    """Action: start the part."""

    part: str


@dataclass(frozen=True, slots=True)
class Terminate:
    """Action: send SIGTERM to the part's process group."""

    part: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Action: kill everything that the part has started."""

    part: str


@dataclass(frozen=True, slots=True)
class Say:
    """Action: tell the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ShowLog:
    """Action: show the last lines of the part's log."""

    part: str


@dataclass(frozen=True, slots=True)
class AllReady:
    """Action: tell the user where the endpoint is."""


@dataclass(frozen=True, slots=True)
class Exit:
    """Action: the end; always the last action."""

    code: int


Event = Begin | PartReady | PartExited | Interrupt | Tick
Action = Spawn | Terminate | Kill | Say | ShowLog | AllReady | Exit


class Supervisor:
    """Decides what to do for a set of parts.

    Args:
        needs: For each part, in order of start, the parts that must be ready before it is started.
        ready_timeout_s: A part that is not ready this long after its start is a failure.
        grace_s: From SIGTERM to SIGKILL.
    """

    def __init__(self, needs: Mapping[str, frozenset[str]], *, ready_timeout_s: float, grace_s: float) -> None:
        self._needs = dict(needs)
        self._ready_timeout_s, self._grace_s = ready_timeout_s, grace_s
        self._states = dict.fromkeys(needs, State.WAITING)
        self._deadlines: dict[str, float] = {}
        self._started: dict[str, float] = {}
        self._actions: list[Action] = []
        self._code = 0
        self._is_stopping = False
        self._next_report = float("inf")

    @property
    def states(self) -> Mapping[str, State]:
        """Where each part is now."""
        return dict(self._states)

    @property
    def deadline(self) -> float | None:
        """When to send a `Tick`, on the clock of ``now``; None if nothing is waited for."""
        times = [*self._deadlines.values()]
        if State.STARTING in self._states.values():
            times.append(self._next_report)
        return min(times, default=None)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in one event and say what to do. Events that come too late to matter are ignored."""
        self._actions = []
        match event:
            case Begin():
                self._next_report = now + REPORT_EVERY_S
                self._start_what_can(now)
            case PartReady(part):
                self._move(part, Cause.READY, now)
                self._start_what_can(now)
            case PartExited(part):
                self._exited(event, now)
            case Interrupt(source):
                self._interrupted(source, now)
            case Tick():
                self._time_has_passed(now)
        if self._is_stopping and all(state in ENDED for state in self._states.values()):
            self._actions.append(Exit(self._code))
        return self._actions

    def _move(self, part: str, cause: Cause, now: float) -> bool:
        """Follow the table; True if this was a failure of the part."""
        before = self._states[part]
        after = TRANSITIONS.get((before, cause))
        if after is None:
            return False
        self._states[part] = after
        self._deadlines.pop(part, None)
        self._entered(part, after, now)
        return (before, cause) in FAILURES

    def _entered(self, part: str, state: State, now: float) -> None:
        match state:
            case State.STARTING:
                self._started[part] = now
                self._deadlines[part] = now + self._ready_timeout_s
                self._actions.append(Spawn(part))
            case State.READY:
                self._actions.append(Say(f"{part} is ready after {now - self._started[part]:.1f} s"))
            case State.STOPPING:
                self._deadlines[part] = now + self._grace_s
                self._actions.append(Terminate(part))
            case State.KILLING:
                self._deadlines[part] = now + KILL_WAIT_S
                self._actions.append(Kill(part))
            case State.LOST:
                self._code = 1
                self._actions.append(Say(f"{part} did not end after SIGKILL; look for it with: ps -ef"))

    def _start_what_can(self, now: float) -> None:
        ready = {part for part, state in self._states.items() if state is State.READY}
        if self._is_stopping:
            return
        if len(ready) == len(self._states):
            self._actions.append(AllReady())
        for part, needs in self._needs.items():
            if needs <= ready:
                self._move(part, Cause.START, now)

    def _exited(self, event: PartExited, now: float) -> None:
        if self._move(event.part, Cause.EXITED, now):
            when = "died" if event.part in self._started and not event.reason else "could not be started"
            self._failed(event.part, f"{event.part} {when}: {event.reason or describe_exit(event.returncode)}", now)

    def _failed(self, part: str, text: str, now: float) -> None:
        self._actions += [Say(text), ShowLog(part)]
        self._code = 1
        self._stop_all(now)

    def _interrupted(self, source: str, now: float) -> None:
        if not self._is_stopping:
            self._actions.append(Say(f"{source}: stopping everything (once more to kill)"))
            self._stop_all(now)
            return
        for part in self._states:
            self._move(part, Cause.HURRY, now)

    def _stop_all(self, now: float) -> None:
        self._is_stopping = True
        for part in self._states:
            self._move(part, Cause.STOP, now)

    def _time_has_passed(self, now: float) -> None:
        for part in [part for part, deadline in self._deadlines.items() if deadline <= now]:
            was = self._states[part]
            if was is State.STOPPING:
                self._actions.append(Say(f"{part} did not stop within {self._grace_s:g} s; killing it"))
            if self._move(part, Cause.LATE, now):
                self._failed(part, f"{part} was not ready within {self._ready_timeout_s:g} s", now)
        if now >= self._next_report and not self._is_stopping:
            self._next_report = now + REPORT_EVERY_S
            self._report_progress(now)

    def _report_progress(self, now: float) -> None:
        starting = [part for part, state in self._states.items() if state is State.STARTING]
        if starting:
            waited = now - min(self._started[part] for part in starting)
            self._actions.append(Say(f"waiting for {', '.join(starting)} ({waited:.0f} s so far)"))


def describe_exit(returncode: int | None) -> str:
    """How a process ended, in words; negative return codes are signals, as in `subprocess`."""
    if returncode is None:
        return "ended in an unknown way"
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"killed by signal {-returncode} ({signal.Signals(-returncode).name})"
    except ValueError:
        return f"killed by signal {-returncode}"
