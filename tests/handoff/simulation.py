"""Both state machines of a hand-off joined over a simulated network, with two small memories and busy engines.

Every queue between two threads or processes is a real queue here, and whoever drives the simulation decides which one
moves next. The shells obey the same rules as the services:

* The engine thread of prefill voids an attempt before it gives its blocks to anybody; the thread that owns the machine
  learns of it by an event, later. A commit is sent only if its attempt is not void at that moment.
* A span is hashed block by block, a read lands block by block; both see the memory as it is at that moment.
* ``ReadDone`` is posted when nothing of the read lands any more, and never before.
* On ``Finish`` the bad blocks are zeroed, then the decode engine uses all blocks that it does not keep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import xxhash

from mooncake_plugins.handoff import WatchSession
from mooncake_plugins.handoff import _messages as wire
from mooncake_plugins.handoff import _pull as pull
from mooncake_plugins.handoff import _source as source
from mooncake_plugins.kv import block_checksums, span_seeds

UInt8Array = npt.NDArray[np.uint8]

TRANSFER = "0123456789abcdef" * 2
LAYERS, BLOCK_BYTES = 2, 16
P_BLOCKS, D_BLOCKS = 12, 8
SCHEDULER, WORKER, STRANGER = 1, 2, 3
LEASE_S, TICKET_S, PULL_S = 10.0, 15.0, 20.0
PROMPT, TOKENS = b"prompt", 77


def right_bytes(layer: int, place: int) -> UInt8Array:
    """The KV of one block."""
    text = xxhash.xxh3_128_digest(f"{layer}/{place}".encode())
    return np.frombuffer(text, np.uint8)


def garbage(number: int) -> UInt8Array:
    """What another request writes: different every time."""
    return np.frombuffer(xxhash.xxh3_128_digest(f"garbage {number}".encode()), np.uint8)


@dataclass(slots=True)
class HashJob:
    """A span that the hash thread is working on, and how far it is."""

    action: source.HashSpan
    sums: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class ReadJob:
    """A span that is landing in decode's memory block by block, each hashed while warm."""

    action: pull.StartRead
    cells: Iterator[tuple[int, int, int]]
    is_slow: bool
    sums: list[int] = field(default_factory=list)
    is_cancelled: bool = False


def cells_of(span: source.Span) -> Iterator[tuple[int, int, int]]:
    """``(layer, place, physical block)`` in the order of the span's checksums."""
    for layer in range(span.layer0, span.layer1):
        for place, block_id in enumerate(span.block_ids, span.block0):
            yield layer, place, block_id


def checksum(block: UInt8Array, layer: int, place: int) -> int:
    seeds = span_seeds(TRANSFER, layer, layer + 1, place, place + 1)
    return int(block_checksums(block.copy(), np.zeros(1, np.int64), np.full(1, BLOCK_BYTES, np.int64), seeds)[0])


class Prefill:
    """The prefill instance: an engine that schedules one request, and the shell around ``PrefillSource``."""

    def __init__(self, blocks: int) -> None:
        self.memory = np.zeros((LAYERS, P_BLOCKS, BLOCK_BYTES), np.uint8)
        self.machine = source.PrefillSource(TRANSFER, LAYERS, expires_at=TICKET_S, lease_s=LEASE_S)
        self.blocks = blocks
        self.is_alive = True
        self.inbox: deque[source.SourceEvent] = deque()
        self.to_hash: deque[HashJob] = deque()
        self.to_decode: dict[int, deque[wire.ToDecode]] = {WORKER: deque(), SCHEDULER: deque(), STRANGER: deque()}
        self.lost_links: set[int] = set()
        self.served: set[int] = set()
        self.void_below = 0
        # The engine's view of its request.
        self.phase = "waiting"  # waiting, running, complete, held, gone
        self.ids: list[int] = []
        self.cached = 0
        self.computed = 0  # blocks that all layers have
        self.step_after = 0  # blocks that the step in progress completes
        self.step_layer: int | None = None  # the next layer of the step in progress
        self.freed = 0
        self.finished = 0
        self.written = 0
        self.withheld = self.committed = 0

    # --- the engine's thread -----------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Between two steps."""
        return self.step_layer is None and self.is_alive

    @property
    def free_blocks(self) -> list[int]:
        return [block for block in range(P_BLOCKS) if block not in self.ids]

    def begin_first_chunk(self, ids: list[int], cached: int, after: int) -> None:
        """Begin an attempt. The first ``cached`` blocks are filled by another request in this very step."""
        self.ids, self.cached, self.computed, self.phase = ids, cached, 0, "running"
        self.inbox.append(source.Scheduled(PROMPT, TOKENS, tuple(ids)))
        self.step_after, self.step_layer = after, 0

    def begin_next_chunk(self, ids: list[int], after: int) -> None:
        self.ids = self.ids + ids
        if ids:
            self.inbox.append(source.Extended(tuple(ids)))
        self.step_after, self.step_layer = after, 0

    def compute_layer(self) -> None:
        """Run the next layer of the step; the last one ends it."""
        layer = self.step_layer
        assert layer is not None
        for place in range(self.computed, self.step_after):
            self.memory[layer, self.ids[place]] = right_bytes(layer, place)
        self.inbox.append(source.Computed(layer, layer + 1, self.step_after))
        self.step_layer = layer + 1
        if self.step_layer == LAYERS:
            self.inbox.append(source.Computed(0, LAYERS, self.step_after))
            self.computed, self.step_layer = self.step_after, None
            if self.computed == self.blocks:
                self.phase = "complete"

    def preempt(self) -> None:
        self.void_below += 1
        self.inbox.append(source.Preempted())
        self.ids, self.phase = [], "waiting"

    def abort(self) -> None:
        self.void_below += 1
        self.inbox.append(source.PrefillEnded(ok=False))
        self.ids, self.phase = [], "gone"

    def hold(self) -> None:
        self.inbox.append(source.PrefillEnded(ok=True))
        self.phase = "held"

    def take_finished(self) -> None:
        """The engine frees what it is told to free."""
        assert self.phase == "held", "freed what the engine does not hold"
        self.finished += 1
        self.ids, self.phase = [], "gone"

    def overwrite(self, layer: int, block: int) -> None:
        """Another request writes a block that is not ours."""
        self.written += 1
        self.memory[layer, block] = garbage(self.written)

    # --- the hash thread and the main thread ------------------------------------------------------------------------

    def hash_block(self) -> None:
        """Hash the next block of the oldest job."""
        job = self.to_hash[0]
        cells = list(cells_of(job.action.span))
        layer, place, block_id = cells[len(job.sums)]
        job.sums.append(checksum(self.memory[layer, block_id], layer, place))
        if len(job.sums) == len(cells):
            self.to_hash.popleft()
            sums = np.asarray(job.sums, np.uint64)
            self.inbox.append(source.Hashed(job.action.attempt, job.action.span.seq, sums))

    def step(self, now: float) -> None:
        """Handle the oldest event."""
        for action in self.machine.handle(self.inbox.popleft(), now):
            self._perform(action)

    def tick(self, now: float) -> None:
        for action in self.machine.handle(source.Tick(), now):
            self._perform(action)

    def _perform(self, action: source.SourceAction) -> None:
        match action:
            case source.Tell():
                self._tell(action)
            case source.TellLayout():
                layout = ([0] * LAYERS, [BLOCK_BYTES] * LAYERS, [BLOCK_BYTES] * LAYERS, P_BLOCKS)
                self._send(action.link, wire.Attached(TRANSFER, action.attempt, *layout))
                self.served.add(action.link)
                assert len(self.served) == 1, "two workers were served with one ticket"
            case source.HashSpan():
                self.to_hash.append(HashJob(action))
            case source.FreeBlocks():
                self.freed += 1
                assert self.freed == 1, "blocks were freed twice"
                assert self.phase == "held", "blocks were freed that the engine does not hold"

    def _tell(self, action: source.Tell) -> None:
        if isinstance(action.message, wire.Commit):
            if action.message.attempt < self.void_below:
                self.withheld += 1
                return
            self.committed += 1
        self._send(action.link, action.message)

    def _send(self, link: int, message: wire.ToDecode) -> None:
        if link not in self.lost_links:
            self.to_decode[link].append(message)


class Decode:
    """The decode instance: an engine that wants blocks, and the shell around ``PullSession``."""

    def __init__(self, first: int, blocks: int) -> None:
        self.memory = np.zeros((LAYERS, D_BLOCKS, BLOCK_BYTES), np.uint8)
        self.memory[:] = 0xEE
        self.first, self.blocks = first, blocks
        self.ids = list(range(1, 1 + blocks))
        self.machine: pull.PullSession | None = None
        self.watch = WatchSession(TRANSFER, PULL_S)
        self.prompt = PROMPT
        self.inbox: deque[pull.PullEvent] = deque()
        self.to_prefill: deque[source.SourceEvent] = deque()
        self.reads: list[ReadJob] = []
        self.report: pull.Finish | None = None
        self.after_report: UInt8Array | None = None
        self.is_link_lost = False
        self.corrupted = 0
        self.started = 0

    def start(self, now: float) -> None:
        """The engine allocated blocks and wants them filled."""
        self.machine = pull.PullSession(TRANSFER, LAYERS, self.first, self.blocks, deadline=now + PULL_S)
        self.inbox.append(pull.LinkUp())

    def step(self, now: float) -> None:
        assert self.machine is not None
        for action in self.machine.handle(self.inbox.popleft(), now):
            self._perform(action)

    def tick(self, now: float) -> None:
        if self.machine is not None:
            for action in self.machine.handle(pull.Tick(), now):
                self._perform(action)

    def _perform(self, action: pull.PullAction) -> None:
        match action:
            case pull.SendAttach():
                self._send(source.Attached(WORKER, self.prompt, TOKENS, self.first))
            case pull.Send(message=wire.Fetched() as fetched):
                self._send(source.Fetched(WORKER, fetched.attempt, fetched.seq))
            case pull.Send(message=wire.Release()):
                self._send(source.Released(WORKER))
            case pull.StartRead():
                self.started += 1
                self.reads.append(ReadJob(action, cells_of(action.span), is_slow=self.started % 3 == 1))
            case pull.CancelReads():
                for job in self.reads:
                    job.is_cancelled = True
            case pull.Finish():
                self._finish(action)

    def _send(self, event: source.SourceEvent) -> None:
        if not self.is_link_lost:
            self.to_prefill.append(event)

    # --- reads -------------------------------------------------------------------------------------------------------

    def land(self, job: ReadJob, prefill: Prefill, *, flip: bool = False) -> None:
        """Let the next block of a read land; the last one ends it."""
        cell = next(job.cells, None)
        if cell is None:
            self.end_read(job, ok=True)
            return
        layer, place, remote = cell
        block = self.memory[layer, self.ids[place - self.first]]
        block[:] = prefill.memory[layer, remote]
        if flip:
            block[3] ^= 0x10
            self.corrupted += 1
        job.sums.append(checksum(block, layer, place))

    def end_read(self, job: ReadJob, *, ok: bool) -> None:
        """Nothing of it lands any more."""
        self.reads.remove(job)
        sums = np.asarray(job.sums, np.uint64) if ok else None
        self.inbox.append(pull.ReadDone(job.action.attempt, job.action.span.seq, sums, "failed"))

    # --- the report --------------------------------------------------------------------------------------------------

    def _finish(self, action: pull.Finish) -> None:
        assert self.report is None, "reported twice"
        assert not self.reads, "reported while reads are under way"
        self.report = action
        bad = [self.ids[place - self.first] for place in action.bad]
        self.memory[:, bad] = 0
        self._check_report(action)
        for place in action.bad:  # the engine uses these for something else at once
            self.memory[:, self.ids[place - self.first]] = 0xAB
        self.after_report = self.memory.copy()

    def _check_report(self, action: pull.Finish) -> None:
        assert set(action.bad) <= set(range(self.first, self.first + self.blocks))
        assert action.good_blocks == self.blocks - len(action.bad)
        assert action.outcome != pull.OK or not action.bad
        assert not action.good_blocks or self.prompt == PROMPT, "KV of another prompt was believed"
        for place in range(self.first, self.first + self.blocks):
            for layer in range(LAYERS):
                is_right = np.array_equal(self.memory[layer, self.ids[place - self.first]], right_bytes(layer, place))
                assert is_right or place in action.bad, f"wrong bytes were believed: layer {layer}, block {place}"

    def check_untouched(self) -> None:
        """What must hold at any moment."""
        others = [block for block in range(D_BLOCKS) if block not in self.ids]
        assert (self.memory[:, others] == 0xEE).all(), "a block was written that nobody asked for"
        if self.after_report is not None:
            assert np.array_equal(self.memory, self.after_report), "a byte landed after the report"
