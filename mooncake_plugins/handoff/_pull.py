"""A decode worker's side of one transfer: a pure state machine.

    CONNECTING ──AttachedTo──▶ PULLING ──all verified──────────────────────▶ ENDED
        │                         │                                            ▲
        └───────any failure───────┴──▶ FENCING ──no read is under way any more─┘

What P announces is read straight into the engine's own blocks, by this side's threads: the owner of memory writes it.
A block counts only when, in every layer, its bytes were committed by P and their checksums match. The end is reported
once: either all blocks are good, or the bad ones are named and were zeroed first (a stale NaN would poison whoever
gets the block next).

A failure never reports before the last read has stopped, so nothing is written into blocks that the engine has given
away.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from mooncake_plugins.handoff import _messages as wire
from mooncake_plugins.handoff._source import Span

UInt64Array = npt.NDArray[np.uint64]


class PullState(Enum):
    """See the picture at the head of this module."""

    CONNECTING = auto()
    PULLING = auto()
    FENCING = auto()
    ENDED = auto()


# --- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The channel to P's worker is open."""


@dataclass(frozen=True, slots=True)
class LayoutRefused:
    """P's cache cannot be read into ours; ``detail`` says why."""

    detail: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message of P about this transfer."""

    message: wire.ToDecode


@dataclass(frozen=True, slots=True)
class ReadDone:
    """A ``StartRead`` has ended; no byte of it lands any more. Without ``checksums`` it failed, ``error`` says why."""

    attempt: int
    seq: int
    checksums: UInt64Array | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The engine aborted the request."""


@dataclass(frozen=True, slots=True)
class Lost:
    """P cannot be reached, or fell silent."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


PullEvent = LinkUp | LayoutRefused | Message | ReadDone | Cancelled | Lost | Tick


# --- actions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendAttach:
    """Send ``Attach`` for this transfer."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to P."""

    message: wire.ToPrefill


@dataclass(frozen=True, slots=True)
class UseLayout:
    """Check P's layout against ours and keep it for the reads; answer ``LayoutRefused`` if they do not fit."""

    message: wire.Attached


@dataclass(frozen=True, slots=True)
class StartRead:
    """Read P's ``span`` into our blocks of the same places in the sequence, hash them, answer with ``ReadDone``."""

    attempt: int
    span: Span


@dataclass(frozen=True, slots=True)
class CancelReads:
    """Stop every read of this transfer; each still answers with ``ReadDone``, then nothing lands."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Zero the blocks at ``bad`` (places in the sequence), then report the transfer to the engine. Comes once."""

    outcome: str
    bad: tuple[int, ...]
    good_blocks: int
    mismatches: int


PullAction = SendAttach | Send | UseLayout | StartRead | CancelReads | Finish

OK = "ok"


class PullSession:
    """A decode worker's side of one transfer.

    Args:
        transfer: The ticket's id.
        layers: Layers of this worker's cache.
        first_block: First block of the sequence that is wanted (those before are in the local prefix cache).
        blocks: How many blocks are wanted.
        deadline: Time (of the clock passed to ``handle``) at which the transfer fails.
        verify: Compare checksums. Off only for measurements and controls: wrong bytes are then believed.

    Not thread-safe; no I/O; the clock is passed in.
    """

    def __init__(
        self, transfer: str, layers: int, first_block: int, blocks: int, *, deadline: float, verify: bool = True
    ) -> None:
        self.transfer = transfer
        self.state = PullState.CONNECTING
        self.first_block, self.blocks = first_block, blocks
        self._deadline, self._verify = deadline, verify
        self._attempt = 0
        self._announced = np.zeros((layers, blocks), np.bool_)
        self._good = np.zeros((layers, blocks), np.bool_)
        self._reading: dict[tuple[int, int], Span] = {}
        self._fetched: dict[tuple[int, int], tuple[Span, UInt64Array]] = {}
        self._waiting: list[StartRead] = []
        self._outcome = OK
        self._mismatches = 0

    def handle(self, event: PullEvent, now: float) -> list[PullAction]:
        """Advance the machine; returns what the shell must do, in order."""
        if self.state is PullState.ENDED:
            return []
        match event:
            case ReadDone():
                return self._read_done(event)
            case _ if self.state is PullState.FENCING:
                return []
            case LinkUp():
                return [SendAttach()]
            case LayoutRefused():
                return self._fail(f"layout: {event.detail}")
            case Message():
                return self._message(event.message)
            case Cancelled():
                return self._fail("cancelled")
            case Lost():
                return self._fail(event.reason)
            case Tick():
                return self._fail("deadline") if now >= self._deadline else []

    # --- messages ----------------------------------------------------------------------------------

    def _message(self, message: wire.ToDecode) -> list[PullAction]:
        match message:
            case wire.Attached() if self.state is PullState.CONNECTING:
                self.state = PullState.PULLING
                self._attempt = message.attempt
                return [UseLayout(message)]
            case wire.Ready() if self.state is PullState.PULLING:
                return self._ready(message)
            case wire.Commit() if self.state is PullState.PULLING:
                return self._commit(message)
            case wire.Restarted() if self.state is PullState.PULLING:
                return self._restarted(message)
            case wire.Refused():
                return self._fail(f"refused ({message.reason}): {message.detail}")
            case wire.Withdrawn():
                return self._fail(f"withdrawn: {message.reason}")
            case _:
                return []

    def _ready(self, message: wire.Ready) -> list[PullAction]:
        if message.attempt != self._attempt:
            return []
        span = Span(message.seq, message.layer0, message.layer1, message.block0, tuple(message.block_ids))
        if not self._wanted(span):
            return self._fail(f"protocol: span {message.seq} lies outside what was asked for")
        # Each block of each layer is read once an attempt: a second read could still write when the first made it good.
        cells = self._announced[self._place(span)]
        if cells.any():
            return self._fail(f"protocol: span {message.seq} was announced before")
        cells[:] = True
        return self._start(StartRead(message.attempt, span))

    def _start(self, read: StartRead) -> list[PullAction]:
        """Start a read, unless reads of an older attempt may still write the same blocks."""
        if any(attempt != self._attempt for attempt, _ in self._reading):
            self._waiting.append(read)
            return []
        self._reading[(read.attempt, read.span.seq)] = read.span
        return [read]

    def _place(self, span: Span) -> tuple[slice, slice]:
        """Where a span lies in the tables of layers x wanted blocks."""
        return slice(span.layer0, span.layer1), slice(span.block0 - self.first_block, span.block1 - self.first_block)

    def _wanted(self, span: Span) -> bool:
        in_layers = 0 <= span.layer0 < span.layer1 <= len(self._good)
        return in_layers and self.first_block <= span.block0 < span.block1 <= self.first_block + self.blocks

    def _read_done(self, event: ReadDone) -> list[PullAction]:
        span = self._reading.pop((event.attempt, event.seq), None)
        if self.state is PullState.FENCING:
            return self._finish_when_fenced()
        if span is None:
            return []
        if event.attempt != self._attempt:
            return self._start_waiting()
        if event.checksums is None:
            return self._fail(f"read: {event.error}")
        self._fetched[(event.attempt, event.seq)] = (span, event.checksums)
        return [Send(wire.Fetched(self.transfer, event.attempt, event.seq))]

    def _commit(self, message: wire.Commit) -> list[PullAction]:
        entry = self._fetched.pop((message.attempt, message.seq), None)
        if entry is None or message.attempt != self._attempt:
            return []
        span, ours = entry
        if len(message.checksums) != 8 * len(ours):
            return self._fail(f"protocol: {len(message.checksums)} bytes of checksums for {len(ours)} blocks")
        theirs = np.frombuffer(message.checksums, "<u8")
        equal = (theirs == ours) if self._verify else np.ones(len(ours), np.bool_)
        self._good[self._place(span)] = equal.reshape(span.layer1 - span.layer0, -1)
        self._mismatches += int((~equal).sum())
        if self._mismatches:
            return self._fail("checksum")
        return self._end() if self._good.all() else []

    def _start_waiting(self) -> list[PullAction]:
        if self._reading:
            return []
        waiting, self._waiting = self._waiting, []
        return [action for read in waiting for action in self._start(read)]

    def _restarted(self, message: wire.Restarted) -> list[PullAction]:
        """P begins again: everything is announced again, so nothing that was read stays good."""
        if message.attempt <= self._attempt:
            return []
        self._attempt = message.attempt
        self._announced[:] = False
        self._good[:] = False
        self._fetched.clear()
        self._waiting.clear()
        return [CancelReads()] if self._reading else []

    # --- the end -----------------------------------------------------------------------------------

    def _fail(self, outcome: str) -> list[PullAction]:
        self.state, self._outcome = PullState.FENCING, outcome
        return [CancelReads(), *self._finish_when_fenced()] if self._reading else self._end()

    def _finish_when_fenced(self) -> list[PullAction]:
        return [] if self._reading else self._end()

    def _end(self) -> list[PullAction]:
        self.state = PullState.ENDED
        good = self._good.all(axis=0)
        bad = tuple((np.flatnonzero(~good) + self.first_block).tolist())
        release = Send(wire.Release(self.transfer, self._outcome))
        return [release, Finish(self._outcome, bad, int(good.sum()), self._mismatches)]
