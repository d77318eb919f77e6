"""A decode scheduler's side of one transfer, before any block is allocated: a pure state machine.

Until P says that the prefill has begun, the decode engine answers "ask later" and holds nothing. If P cannot serve the
transfer, the decode engine computes the prompt itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from mooncake_plugins.handoff import _messages as wire


class WatchState(Enum):
    """ASKING until P answers; READY: pull now; DECLINED: compute here."""

    ASKING = auto()
    READY = auto()
    DECLINED = auto()


@dataclass(slots=True)
class WatchSession:
    """What a decode scheduler knows of one transfer.

    Attributes:
        transfer: The ticket's id.
        deadline: Time after which nobody waits for P any more.
        reason: Why it was declined, in one word; ``detail`` is a sentence.

    Not thread-safe; no I/O; the clock is passed in.
    """

    transfer: str
    deadline: float
    state: WatchState = WatchState.ASKING
    reason: str = ""
    detail: str = ""

    def answered(self, message: wire.ToDecode) -> None:
        """Take a message of P about this transfer. Once READY, only a withdrawal or refusal changes anything."""
        match message:
            case wire.Scheduled() if self.state is WatchState.ASKING:
                self.state = WatchState.READY
            case wire.Refused():
                self.decline(message.reason, message.detail)
            case wire.Withdrawn():
                self.decline("withdrawn", message.reason)
            case _:
                pass

    def decline(self, reason: str, detail: str = "") -> None:
        """Give the transfer up; the first reason stays."""
        if self.state is not WatchState.DECLINED:
            self.state, self.reason, self.detail = WatchState.DECLINED, reason, detail

    def tick(self, now: float) -> None:
        """Notice the deadline."""
        if self.state is WatchState.ASKING and now >= self.deadline:
            self.decline("deadline", "prefill did not begin in time")
