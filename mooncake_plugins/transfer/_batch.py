"""A batch as callers hold it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mooncake_plugins.errors import MooncakeError, TransferError
from mooncake_plugins.transports import Opcode, Work
from mooncake_plugins.wire import Deadline

from ._batch_machine import (
    Action,
    BatchMachine,
    BatchStatus,
    CancelRequested,
    DeadlinePassed,
    Event,
    WorkDone,
    WorkFailed,
)


class Batch:
    """A batch of transfers under way. Made by `TransferEngine.submit`; all methods are thread-safe."""

    def __init__(
        self,
        opcode: Opcode,
        path: str,
        total_bytes: int,
        works: int,
        deadline: Deadline,
        stop_movers: Callable[[Batch], None],
        on_finish: Callable[[Batch], None],
        explain: Callable[[Work, MooncakeError], MooncakeError] = lambda _, error: error,
    ) -> None:
        self.opcode = opcode
        self.path = path
        self.total_bytes = total_bytes
        self.deadline = deadline
        self.started_at = time.monotonic()
        self._stop_movers, self._on_finish, self._explain = stop_movers, on_finish, explain
        self._machine = BatchMachine(works)
        self._lock = threading.Lock()
        self._finished = threading.Event()

    @property
    def status(self) -> BatchStatus:
        """Where it stands now; looks at the deadline."""
        self._look_at_clock()
        return self._machine.status if self._finished.is_set() else BatchStatus.PENDING

    @property
    def final_status(self) -> BatchStatus:
        """Where it stands, before anybody who waits is told; PENDING while not terminal."""
        return self._machine.status

    @property
    def error(self) -> MooncakeError | None:
        """Why it failed; None while pending, when done, and when cancelled."""
        return self._machine.error

    @property
    def bytes_done(self) -> int:
        """Bytes of works that have ended well."""
        return self._machine.bytes_done

    def wait(self, timeout_s: float) -> BatchStatus:
        """Wait until the batch is terminal.

        Returns:
            PENDING if ``timeout_s`` passed first. With any other answer, no buffer of this side is read or written
            any more on behalf of this batch.

        Blocking: up to ``timeout_s``. Thread-safe.
        """
        until = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            before_deadline = max(0.0, self.deadline.at - now)
            if self._finished.wait(max(0.0, min(until - now, before_deadline or until - now))):
                return self._machine.status
            self._look_at_clock()
            if time.monotonic() >= until:
                return self.status

    def cancel(self) -> None:
        """Ask for the end of the batch; ``wait`` says when it has come. A batch that is terminal stays as it is.

        Blocking: never.
        """
        self._post(CancelRequested())

    def _look_at_clock(self) -> None:
        if self.deadline.has_passed and not self._machine.is_terminal:
            self._post(DeadlinePassed())

    @property
    def is_stopping(self) -> bool:
        """For movers: a failure, a cancel or the deadline has ended the batch, though maybe not every work yet."""
        return self._machine.is_stopping

    @property
    def status_allows_work(self) -> bool:
        """For movers: is it worth while to connect for this batch?"""
        self._look_at_clock()
        return not (self._machine.is_stopping or self._machine.is_terminal)

    def begin_work(self) -> bool:
        """For movers: may a work begin? If so, ``end_work`` or ``fail_work`` must follow."""
        with self._lock:
            return self._machine.begin()

    def end_work(self, moved_bytes: int) -> None:
        """For movers: a work ended well."""
        self._post(WorkDone(moved_bytes))

    def fail_work(self, work: Work, error: BaseException) -> None:
        """For movers: a work that had begun ended badly."""
        self._post(WorkFailed(self._explain(work, _as_ours(error))))

    def fail_early(self, error: BaseException) -> None:
        """For movers: a work could not begin."""
        with self._lock:
            actions = self._machine.fail_early(_as_ours(error))
        self._perform(actions)

    def _post(self, event: Event) -> None:
        with self._lock:
            actions = self._machine.handle(event)
        self._perform(actions)

    def _perform(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if action is Action.STOP_MOVERS:
                self._stop_movers(self)
            else:
                self._on_finish(self)
                self._finished.set()

    def __repr__(self) -> str:
        return (
            f"Batch({self.opcode.value} path={self.path} status={self._machine.status.value} "
            f"bytes={self.bytes_done}/{self.total_bytes})"
        )


def _as_ours(error: BaseException) -> MooncakeError:
    if isinstance(error, MooncakeError):
        return error
    wrapped = TransferError(f"internal error: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
