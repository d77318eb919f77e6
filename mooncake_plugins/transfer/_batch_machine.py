"""The states of a batch, without threads, sockets or a clock.

    RUNNING --last work done--> DONE
    RUNNING --a work failed | cancel | deadline--> STOPPING --no work is active--> FAILED | CANCELLED

A work is *active* from ``begin`` until it ended: only then may a mover touch this side's memory for it. So a batch is
terminal only when nothing touches memory on its behalf any more, and works that were never begun need not be waited
for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from mooncake_plugins.errors import DeadlineExceededError, MooncakeError


class BatchStatus(Enum):
    """Where a batch stands, as callers see it."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class WorkDone:
    """A work ended well."""

    moved_bytes: int


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """A work ended badly."""

    error: MooncakeError


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """The caller does not want the batch any more."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The deadline is over."""


Event: TypeAlias = WorkDone | WorkFailed | CancelRequested | DeadlinePassed


class Action(Enum):
    """What the shell has to do."""

    STOP_MOVERS = "interrupt the movers that work on this batch"
    FINISH = "the batch is terminal"


class BatchMachine:
    """The state of one batch of ``works`` works."""

    def __init__(self, works: int) -> None:
        self.unfinished = works
        self.active = 0
        self.bytes_done = 0
        self.status = BatchStatus.PENDING
        self.error: MooncakeError | None = None
        self._outcome: BatchStatus | None = None  # set while STOPPING

    @property
    def is_terminal(self) -> bool:
        """True once no memory is touched any more."""
        return self.status is not BatchStatus.PENDING

    @property
    def is_stopping(self) -> bool:
        """True from the first failure, cancel or deadline."""
        return self._outcome is not None

    def begin(self) -> bool:
        """A mover wants to begin a work; False: it must not."""
        if self.is_stopping or self.is_terminal:
            return False
        self.active += 1
        return True

    def handle(self, event: Event) -> tuple[Action, ...]:
        """Take one event; return what is to be done."""
        match event:
            case WorkDone(moved_bytes):
                self.active -= 1
                self.unfinished -= 1
                self.bytes_done += moved_bytes
                return self._settle()
            case WorkFailed(error):
                self.active -= 1
                return self._stop(BatchStatus.FAILED, error)
            case CancelRequested():
                return self._stop(BatchStatus.CANCELLED, None)
            case DeadlinePassed():
                error = DeadlineExceededError("the batch's deadline passed")
                return self._stop(BatchStatus.FAILED, error)

    def fail_early(self, error: MooncakeError) -> tuple[Action, ...]:
        """A work could not even be begun (no connection)."""
        return self._stop(BatchStatus.FAILED, error)

    def _stop(self, outcome: BatchStatus, error: MooncakeError | None) -> tuple[Action, ...]:
        if self.is_terminal:
            return ()
        first = not self.is_stopping
        if first:
            self._outcome, self.error = outcome, error
        finish = self._settle()
        return finish if finish or not first else (Action.STOP_MOVERS,)

    def _settle(self) -> tuple[Action, ...]:
        if self.active or self.is_terminal:
            return ()
        if self._outcome is not None:
            self.status = self._outcome
        elif self.unfinished == 0:
            self.status = BatchStatus.DONE
        return (Action.FINISH,) if self.is_terminal else ()
