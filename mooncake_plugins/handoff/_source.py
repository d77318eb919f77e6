"""P's side of one transfer: a pure state machine.

    EXPECTED ──Scheduled──▶ ACTIVE ──PrefillEnded(ok)──▶ HELD ──Released | lease over──▶ ENDED
        ▲                     │  │                                                        ▲
        └──────Preempted──────┘  └──PrefillEnded(not ok)──────────────────────────────────┘

What the engine computes is announced to the one decode worker that attached, as rectangles (layers x blocks).
``ready[l]`` counts the blocks of the sequence whose KV layer ``l`` has; ``announced[l]`` how many of them were
announced. Whoever attaches late is caught up by the same rule: the difference is announced. Blocks out of the engine's
prefix cache become ready layer by layer with what the first step computes, and not before: an engine counts a block as
cached as soon as a request that will compute it is scheduled, so it may be filled by another request in the very step
that begins now.

A span's checksums are sent (``Commit``) only while the blocks still belong to the request, after they were hashed,
which was after D had read them. So a commit proves that D read the right bytes; data without a commit proves nothing.

The blocks are given back (``FreeBlocks``) exactly once, and only after the engine said ``PrefillEnded(ok)``: until
then the engine itself holds them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from mooncake_plugins.handoff import _messages as wire

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

# Blocks (of one layer each) in a span. Spans are read, hashed and committed one after the other, so smaller ones
# overlap better; and a commit of any number of blocks must fit in a frame.
_SPAN_CELLS = 512


class SourceState(Enum):
    """See the picture at the head of this module."""

    EXPECTED = auto()
    ACTIVE = auto()
    HELD = auto()
    ENDED = auto()


# --- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The engine runs the first chunk of an attempt. No block is known to be computed yet, not even cached ones."""

    prompt: bytes
    tokens: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Extended:
    """The engine gave the request more blocks."""

    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Computed:
    """Layers ``layer0..layer1`` now have the KV of the first ``blocks`` blocks."""

    layer0: int
    layer1: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Preempted:
    """The engine took the blocks away; it will begin again."""


@dataclass(frozen=True, slots=True)
class PrefillEnded:
    """The request is finished in the engine. With ``ok`` the engine now holds its blocks until ``FreeBlocks``."""

    ok: bool


@dataclass(frozen=True, slots=True)
class Watched:
    """A decode scheduler wants to know when the prefill begins. ``link`` names its channel."""

    link: int
    prompt: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class Attached:
    """A decode worker wants the blocks from ``first_block`` on."""

    link: int
    prompt: bytes
    tokens: int
    first_block: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """The decode worker has read a span."""

    link: int
    attempt: int
    seq: int


@dataclass(frozen=True, slots=True)
class Hashed:
    """The shell has hashed a span (answer to ``HashSpan``)."""

    attempt: int
    seq: int
    checksums: UInt64Array


@dataclass(frozen=True, slots=True)
class Released:
    """A decode scheduler or worker needs nothing more."""

    link: int


@dataclass(frozen=True, slots=True)
class LinkLost:
    """A channel is gone."""

    link: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


SourceEvent = (
    Scheduled
    | Extended
    | Computed
    | Preempted
    | PrefillEnded
    | Watched
    | Attached
    | Fetched
    | Hashed
    | Released
    | LinkLost
    | Tick
)


# --- actions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message on a channel."""

    link: int
    message: wire.ToDecode


@dataclass(frozen=True, slots=True)
class TellLayout:
    """Send ``Attached`` with the layout of this cache, which the shell knows."""

    link: int
    attempt: int


@dataclass(frozen=True, slots=True)
class HashSpan:
    """Hash these blocks of this process's cache and answer with ``Hashed``."""

    attempt: int
    span: Span


@dataclass(frozen=True, slots=True)
class FreeBlocks:
    """Tell the engine that it may free the blocks."""


@dataclass(frozen=True, slots=True)
class Forget:
    """The machine has ended; ``reason`` says how."""

    reason: str


SourceAction = Tell | TellLayout | HashSpan | FreeBlocks | Forget


@dataclass(frozen=True, slots=True)
class Span:
    """A rectangle of blocks: layers ``layer0..layer1``, sequence blocks from ``block0``, physically ``block_ids``."""

    seq: int
    layer0: int
    layer1: int
    block0: int
    block_ids: tuple[int, ...]

    @property
    def block1(self) -> int:
        return self.block0 + len(self.block_ids)


class PrefillSource:
    """P's side of one transfer.

    Args:
        transfer: The ticket's id.
        layers: Layers of this worker's cache.
        expires_at: Time (of the clock that is passed to ``handle``) after which an unscheduled request is forgotten.
        lease_s: Seconds for which blocks are held after the prefill has ended.

    Not thread-safe; no I/O; the clock is passed in.
    """

    def __init__(self, transfer: str, layers: int, *, expires_at: float, lease_s: float) -> None:
        self.transfer = transfer
        self.state = SourceState.EXPECTED
        self.attempt = 0
        self._expires_at, self._lease_s = expires_at, lease_s
        self._lease_until = float("inf")
        self._prompt: tuple[bytes, int] | None = None
        self._block_ids: list[int] = []
        self._ready = np.zeros(layers, np.int64)
        self._announced = np.zeros(layers, np.int64)
        self._first_block = 0
        self._watchers: dict[int, tuple[bytes, int]] = {}
        self._puller: int | None = None
        self._puller_prompt: tuple[bytes, int] = (b"", 0)
        self._had_puller = False
        self._consumer_done = False
        self._spans: dict[int, Span] = {}
        self._hashing: set[int] = set()
        self._next_seq = 1
        self._is_free = False

    def handle(self, event: SourceEvent, now: float) -> list[SourceAction]:
        """Advance the machine; returns what the shell must do, in order."""
        if self.state is SourceState.ENDED:
            return self._after_end(event)
        match event:
            case Scheduled():
                return self._scheduled(event)
            case Extended():
                self._block_ids.extend(event.block_ids)
                return []
            case Computed():
                return self._computed(event)
            case Preempted():
                return self._preempted()
            case PrefillEnded():
                return self._prefill_ended(event.ok, now)
            case Watched():
                return self._watched(event)
            case Attached():
                return self._attached(event)
            case Fetched():
                return self._fetched(event)
            case Hashed():
                return self._hashed(event)
            case Released() | LinkLost():
                return self._consumer_gone(event.link)
            case Tick():
                return self._tick(now)

    # --- the engine --------------------------------------------------------------------------------

    def _scheduled(self, event: Scheduled) -> list[SourceAction]:
        self.state = SourceState.ACTIVE
        self._prompt = (event.prompt, event.tokens)
        self._block_ids = list(event.block_ids)
        self._ready[:] = 0
        actions: list[SourceAction] = []
        for link, prompt in list(self._watchers.items()):
            actions += self._answer_watcher(link, prompt)
        if self._puller is not None and self._puller_prompt != self._prompt:
            return actions + self._refuse_puller()
        return actions + self._announce()

    def _computed(self, event: Computed) -> list[SourceAction]:
        if self.state is not SourceState.ACTIVE:
            return []
        layers = slice(event.layer0, event.layer1)
        blocks = min(event.blocks, len(self._block_ids))
        np.maximum(self._ready[layers], blocks, out=self._ready[layers])
        return self._announce()

    def _preempted(self) -> list[SourceAction]:
        if self.state is not SourceState.ACTIVE:
            return []
        self.attempt += 1
        self.state = SourceState.EXPECTED
        self._block_ids, self._spans, self._hashing = [], {}, set()
        self._ready[:] = 0
        self._announced[:] = self._first_block
        return [] if self._puller is None else [Tell(self._puller, wire.Restarted(self.transfer, self.attempt))]

    def _prefill_ended(self, ok: bool, now: float) -> list[SourceAction]:
        if self.state is SourceState.HELD:
            return []
        if not ok:
            return self._end("the prefill was aborted", free=False)
        self.state = SourceState.HELD
        self._lease_until = now + self._lease_s
        return self._end("done", free=True) if self._consumer_done else []

    # --- the consumer ------------------------------------------------------------------------------

    def _watched(self, event: Watched) -> list[SourceAction]:
        self._watchers[event.link] = (event.prompt, event.tokens)
        if self.state is SourceState.EXPECTED:
            return []
        return self._answer_watcher(event.link, (event.prompt, event.tokens))

    def _answer_watcher(self, link: int, prompt: tuple[bytes, int]) -> list[SourceAction]:
        if prompt == self._prompt:
            return [Tell(link, wire.Scheduled(self.transfer))]
        return [Tell(link, self._other_prompt(prompt[1])), *self._consumer_gone(link)]

    def _attached(self, event: Attached) -> list[SourceAction]:
        if self._had_puller:
            return [
                Tell(event.link, wire.Refused(self.transfer, "reused", "a worker has attached with this ticket before"))
            ]
        self._puller, self._puller_prompt = event.link, (event.prompt, event.tokens)
        # Whoever watched may have left before the worker came; the worker counts.
        self._had_puller, self._consumer_done = True, False
        self._first_block = event.first_block
        self._announced[:] = event.first_block
        if self.state is not SourceState.EXPECTED and self._puller_prompt != self._prompt:
            return self._refuse_puller()
        return [TellLayout(event.link, self.attempt), *self._announce()]

    def _refuse_puller(self) -> list[SourceAction]:
        link = self._puller
        assert link is not None
        refusal = Tell(link, self._other_prompt(self._puller_prompt[1]))
        return [refusal, *self._consumer_gone(link)]

    def _other_prompt(self, tokens: int) -> wire.Refused:
        here = self._prompt[1] if self._prompt else 0
        return wire.Refused(
            self.transfer, "prompt", f"decode has another prompt ({tokens} tokens) than prefill ({here} tokens)"
        )

    def _fetched(self, event: Fetched) -> list[SourceAction]:
        if event.link != self._puller or event.attempt != self.attempt or event.seq not in self._spans:
            return []
        self._hashing.add(event.seq)
        return [HashSpan(event.attempt, self._spans.pop(event.seq))]

    def _hashed(self, event: Hashed) -> list[SourceAction]:
        if event.attempt != self.attempt or event.seq not in self._hashing or self._puller is None:
            return []
        self._hashing.discard(event.seq)
        checksums = event.checksums.astype("<u8").tobytes()
        return [Tell(self._puller, wire.Commit(self.transfer, event.attempt, event.seq, checksums))]

    def _consumer_gone(self, link: int) -> list[SourceAction]:
        was_watching = self._watchers.pop(link, None) is not None
        if link == self._puller:
            self._puller = None
            self._consumer_done = True
        elif was_watching and self._puller is None and not self._watchers:
            self._consumer_done = True
        if self._consumer_done and self.state is SourceState.HELD:
            return self._end("done", free=True)
        return []

    def _announce(self) -> list[SourceAction]:
        """Announce every block that is ready and not announced; equal neighbouring layers go in one span."""
        if self._puller is None or self._consumer_done or self.state is SourceState.EXPECTED:
            return []
        spans = [self._new_span(*piece) for rectangle in self._unannounced() for piece in _pieces(*rectangle)]
        np.maximum(self._announced, self._ready, out=self._announced)
        return [self._ready_message(span, self._puller) for span in spans]

    def _unannounced(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield ``(layer0, layer1, block0, block1)``."""
        pairs = np.stack([self._announced, self._ready], axis=1)
        cuts = np.flatnonzero((pairs[1:] != pairs[:-1]).any(axis=1)) + 1
        edges = [0, *cuts.tolist(), len(pairs)]
        for layer0, layer1 in itertools.pairwise(edges):
            block0, block1 = pairs[layer0].tolist()
            if block0 < block1:
                yield layer0, layer1, block0, block1

    def _new_span(self, layer0: int, layer1: int, block0: int, block1: int) -> Span:
        span = Span(self._next_seq, layer0, layer1, block0, tuple(self._block_ids[block0:block1]))
        self._next_seq += 1
        self._spans[span.seq] = span
        return span

    def _ready_message(self, span: Span, link: int) -> Tell:
        place = (span.layer0, span.layer1, span.block0, list(span.block_ids))
        return Tell(link, wire.Ready(self.transfer, self.attempt, span.seq, *place))

    # --- the end -----------------------------------------------------------------------------------

    def _tick(self, now: float) -> list[SourceAction]:
        if self.state is SourceState.HELD and now >= self._lease_until:
            return self._end("the lease ran out", free=True)
        if self.state is SourceState.EXPECTED and now >= self._expires_at and self.attempt == 0:
            return self._end("the ticket expired before the prefill began", free=False)
        return []

    def _end(self, reason: str, *, free: bool) -> list[SourceAction]:
        self.state = SourceState.ENDED
        links = {*self._watchers, *([] if self._puller is None else [self._puller])}
        actions: list[SourceAction] = []
        if reason != "done":
            actions += [Tell(link, wire.Withdrawn(self.transfer, reason)) for link in sorted(links)]
        if free:
            self._is_free = True
            actions.append(FreeBlocks())
        return [*actions, Forget(reason)]

    def _after_end(self, event: SourceEvent) -> list[SourceAction]:
        match event:
            case Watched() | Attached():
                return [Tell(event.link, wire.Refused(self.transfer, "ended", "this transfer has ended"))]
            case PrefillEnded(ok=True) if not self._is_free:
                self._is_free = True
                return [FreeBlocks()]
            case _:
                return []


def _pieces(layer0: int, layer1: int, block0: int, block1: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a rectangle into spans of at most ``_SPAN_CELLS``, layer by layer."""
    layers = max(1, _SPAN_CELLS // (block1 - block0))
    blocks = min(_SPAN_CELLS, block1 - block0)
    for layer in range(layer0, layer1, layers):
        for block in range(block0, block1, blocks):
            yield layer, min(layer + layers, layer1), block, min(block + blocks, block1)
