"""D's side of the hand-off in a worker process: the shell around ``PullSession``.

Threads: the engine's own (calls ``start``, ``cancel``, ``take_results``: none blocks), one for each link to a prefill
    worker, ``main``, which owns all state machines, and a few readers that move bytes and hash them while they are
    warm.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from mooncake_plugins.errors import MooncakeError
from mooncake_plugins.handoff import _messages as wire
from mooncake_plugins.handoff import _pull as machine
from mooncake_plugins.handoff._cache import BlockCache
from mooncake_plugins.handoff._link import Link
from mooncake_plugins.handoff._options import HandoffOptions
from mooncake_plugins.handoff._source import Span
from mooncake_plugins.handoff._source_service import SourceIdentity
from mooncake_plugins.handoff._steps import PullRequest, PullResult
from mooncake_plugins.kv import CacheLayout, span_seeds
from mooncake_plugins.transfer import Batch, BatchStatus, Opcode, Peer, TransferEngine
from mooncake_plugins.wire import Channel

log = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

_TICK_S = 0.1
_CONNECT_TIMEOUT_S = 3.0
_FENCE_GRACE_S = 5.0


@dataclass(slots=True, eq=False)
class _Session:
    """A transfer with what the shell keeps for it."""

    request: PullRequest
    machine: machine.PullSession
    started: float
    link: Link
    remote: CacheLayout | None = None
    jobs: dict[tuple[int, int], _ReadJob] = field(default_factory=dict)
    received_bytes: int = 0
    # When prefill last announced something, and what had arrived by then: that much of the transfer was hidden behind
    # it.
    announced_at: float = 0.0
    hidden_bytes: int = 0
    transport: str = ""


class _ReadJob:
    """One span being read by a reader thread. ``cancel`` may come from ``main`` at any time."""

    def __init__(self, session: _Session, read: machine.StartRead, remote: CacheLayout, deadline: float) -> None:
        self.session, self.read, self.remote, self.deadline = session, read, remote, deadline
        self._lock = threading.Lock()
        self._batch: Batch | None = None
        self._is_cancelled = False
        self.received_bytes = 0

    def cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True
            if self._batch is not None:
                self._batch.cancel()

    def transfer(
        self, engine: TransferEngine, peer: Peer, local: Int64Array, remote: Int64Array, lengths: Int64Array
    ) -> None:
        """Read ranges; returns when they are here, raises when nothing of them can land any more."""
        left = self.deadline - time.monotonic()
        with self._lock:
            if self._is_cancelled or left <= 0:
                raise MooncakeError("cancelled" if self._is_cancelled else "deadline")
            self._batch = engine.submit(peer, Opcode.READ, local, remote, lengths, deadline_s=left)
        # The engine ends the batch at its deadline; the grace only covers its fencing.
        status = self._batch.wait(left + _FENCE_GRACE_S)
        while status is BatchStatus.PENDING:
            # To report now would give the engine memory that may still be written. Blocks that stay away are the
            # lesser evil.
            log.error("a read does not end transfer=%s; its blocks are not reported", self.session.request.transfer)
            status = self._batch.wait(_FENCE_GRACE_S)
        if status is not BatchStatus.DONE:
            raise self._batch.error or MooncakeError(f"read ended as {status.name}")


class PullService:
    """Pulls KV from prefill workers into this worker's cache.

    Args:
        engine: Moves the bytes; the cache is registered with it.
        cache: This worker's KV cache; the pulled blocks are written by this service alone until they are reported.
        identity: Who this worker is.
        options: Timeouts, reader threads.

    ``start``, ``cancel``, ``take_results`` never block and may come from any thread. Owns its threads; ``close`` ends
    them.
    """

    def __init__(
        self, engine: TransferEngine, cache: BlockCache, identity: SourceIdentity, options: HandoffOptions
    ) -> None:
        self._engine, self._cache, self._identity, self._options = engine, cache, identity, options
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[_ReadJob | None] = queue.SimpleQueue()
        self._sessions: dict[str, _Session] = {}
        self._by_transfer: dict[str, _Session] = {}
        self._links: dict[str, Link] = {}
        self._up: set[Link] = set()
        self._peers: dict[Link, Peer] = {}
        # What prefill must hear as soon as a link that is still opening is up: else it holds blocks for nobody until
        # its lease ends.
        self._farewells: dict[Link, list[wire.ToPrefill]] = {}
        self._results: list[PullResult] = []
        self._lock = threading.Lock()
        self._activity = threading.Event()
        self._counters: Counter[str] = Counter()
        self._is_closing = False
        self._threads = [threading.Thread(target=self._main, name="mooncake-pull", daemon=True)]
        self._threads += [
            threading.Thread(target=self._reader, name=f"mooncake-reader-{i}", daemon=True)
            for i in range(options.readers)
        ]
        for thread in self._threads:
            thread.start()

    # --- the engine's thread -----------------------------------------------------------------------

    def start(self, requests: Iterable[PullRequest]) -> None:
        """Begin to pull. Each request gets exactly one result."""
        for request in requests:
            self._inbox.put(partial(self._start, request))

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Give up; the result still comes, once nothing lands any more."""
        for request_id in request_ids:
            self._inbox.put(partial(self._dispatch, request_id, machine.Cancelled()))

    def take_results(self) -> list[PullResult]:
        """Return what has ended since the last call."""
        with self._lock:
            results, self._results = self._results, []
            self._activity.clear()
        return results

    def wait_for_result(self, timeout_s: float) -> None:
        """Block until there is a result, or for ``timeout_s``; for an engine that has nothing else to do."""
        self._activity.wait(timeout_s)

    @property
    def live_transfers(self) -> int:
        """Transfers that have not ended."""
        return len(self._sessions)

    @property
    def counters(self) -> Counter[str]:
        """What was counted since the start: a copy."""
        return Counter(self._counters)

    def close(self) -> None:
        """Stop reading and end the threads; transfers that had not ended get no result. Idempotent."""
        if self._is_closing:
            return
        self._is_closing = True
        self._inbox.put(None)
        for thread in self._threads:
            thread.join(timeout=_FENCE_GRACE_S)
        for link in list(self._links.values()):
            link.close()

    def _stop(self) -> None:
        """The last thing that ``main`` does: it made all jobs, so none comes after these are cancelled."""
        for session in self._sessions.values():
            for job in session.jobs.values():
                job.cancel()
        for _ in range(self._options.readers):
            self._jobs.put(None)

    # --- links -------------------------------------------------------------------------------------

    def link_up(self, link: Link) -> None:
        peer = self._engine.open(link.address, timeout_s=_CONNECT_TIMEOUT_S)
        self._inbox.put(partial(self._link_up, link, peer))

    def link_message(self, link: Link, message: wire.ToDecode) -> None:
        self._inbox.put(partial(self._message, message))

    def link_lost(self, link: Link, reason: str) -> None:
        self._inbox.put(partial(self._link_lost, link, reason))

    def _connect(self, address: str) -> Channel:
        return self._engine.connect(
            address, wire.HANDOFF_ROLE, message_type=wire.ToDecode, timeout_s=_CONNECT_TIMEOUT_S
        )

    def _link_up(self, link: Link, peer: Peer) -> None:
        self._up.add(link)
        self._peers[link] = peer
        for session in list(self._sessions.values()):
            if session.link is link:
                self._dispatch(session.request.request_id, machine.LinkUp())
        for message in self._farewells.pop(link, ()):
            link.send(message)

    def _link_lost(self, link: Link, reason: str) -> None:
        self._up.discard(link)
        self._farewells.pop(link, None)
        if self._links.get(link.address) is link:
            del self._links[link.address]
        for session in list(self._sessions.values()):
            if session.link is link:
                self._dispatch(session.request.request_id, machine.Lost(reason))
        self._peers.pop(link, None)

    # --- the main thread ---------------------------------------------------------------------------

    def _main(self) -> None:
        next_tick = time.monotonic()
        while True:
            try:
                item = self._inbox.get(timeout=max(0.0, next_tick - time.monotonic()))
                if item is None:
                    return self._stop()
                item()
            except queue.Empty:
                pass
            except Exception:
                log.exception("hand-off pull: an event could not be handled")
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + _TICK_S
                for request_id in list(self._sessions):
                    self._dispatch(request_id, machine.Tick())

    def _start(self, request: PullRequest) -> None:
        now = time.monotonic()
        if request.request_id in self._sessions or request.transfer in self._by_transfer:
            log.error("pulled twice request=%s transfer=%s", request.request_id, request.transfer)
            self._cache.zero(request.block_ids)
            self._report(PullResult(request.request_id, "reused here", request.block_ids, 0, 0, 0.0, 0.0))
            return
        deadline = now + self._options.transfer_timeout_s
        layers, blocks = self._cache.layout.num_layers, len(request.block_ids)
        pull = machine.PullSession(
            request.transfer, layers, request.first_block, blocks, deadline=deadline, verify=self._options.verify
        )
        address = request.addresses.get(str(self._identity.coordinate), "")
        session = _Session(request, pull, now, self._link_to(address))
        self._sessions[request.request_id] = self._by_transfer[request.transfer] = session
        self._counters["pulls"] += 1
        if session.link in self._up:
            self._dispatch(request.request_id, machine.LinkUp())

    def _link_to(self, address: str) -> Link:
        if address not in self._links:
            self._links[address] = Link(address, self._connect, self, peer_timeout_s=self._options.peer_timeout_s)
        return self._links[address]

    def _message(self, message: wire.ToDecode) -> None:
        session = None if isinstance(message, wire.Pong) else self._by_transfer.get(message.transfer)
        if session is None:
            return
        if isinstance(message, wire.Ready):
            session.announced_at, session.hidden_bytes = time.monotonic(), session.received_bytes
        self._dispatch(session.request.request_id, machine.Message(message))

    def _dispatch(self, request_id: str, event: machine.PullEvent) -> None:
        session = self._sessions.get(request_id)
        if session is None:
            return
        for action in session.machine.handle(event, time.monotonic()):
            self._perform(session, action)

    def _perform(self, session: _Session, action: machine.PullAction) -> None:
        match action:
            case machine.SendAttach():
                session.link.send(self._attach(session.request))
            case machine.Send():
                self._send(session, action.message)
            case machine.UseLayout():
                self._use_layout(session, action.message)
            case machine.StartRead():
                self._start_read(session, action)
            case machine.CancelReads():
                for job in list(session.jobs.values()):
                    job.cancel()
            case machine.Finish():
                self._finish(session, action)

    def _send(self, session: _Session, message: wire.ToPrefill) -> None:
        link = session.link
        if link in self._up:
            link.send(message)
        elif isinstance(message, wire.Release) and self._links.get(link.address) is link:
            self._farewells.setdefault(link, []).extend((self._attach(session.request), message))

    def _attach(self, request: PullRequest) -> wire.Attach:
        me = self._identity
        who = (request.transfer, request.ticket, me.instance, request.prompt, request.tokens, dict(me.fingerprint))
        return wire.Attach(*who, str(me.coordinate), request.first_block)

    def _use_layout(self, session: _Session, message: wire.Attached) -> None:
        ours = self._cache.layout
        try:
            remote = CacheLayout.of(message.base, message.stride, message.block_bytes, message.num_blocks)
            if not np.array_equal(remote.block_bytes, ours.block_bytes):
                raise MooncakeError(
                    f"{remote.num_layers} layers of {remote.block_bytes[0]} bytes a block on prefill, "
                    f"{ours.num_layers} of {ours.block_bytes[0]} on decode"
                )
            session.remote = remote
        except MooncakeError as error:
            self._dispatch(session.request.request_id, machine.LayoutRefused(str(error)))

    def _start_read(self, session: _Session, read: machine.StartRead) -> None:
        assert session.remote is not None  # the machine starts reads only after UseLayout
        deadline = session.started + self._options.transfer_timeout_s
        job = _ReadJob(session, read, session.remote, deadline)
        session.jobs[(read.attempt, read.span.seq)] = job
        self._jobs.put(job)

    def _finish(self, session: _Session, action: machine.Finish) -> None:
        request = session.request
        bad = tuple(request.block_ids[place - request.first_block] for place in action.bad)
        self._cache.zero(bad)
        del self._sessions[request.request_id]
        del self._by_transfer[request.transfer]
        now = time.monotonic()
        self._count(session, action)
        result = PullResult(
            request.request_id, action.outcome, bad, action.good_blocks, session.received_bytes,
            seconds=now - session.started, exposed_seconds=now - (session.announced_at or session.started),
        )  # fmt: skip
        self._report(result)

    def _report(self, result: PullResult) -> None:
        with self._lock:
            self._results.append(result)
            self._activity.set()

    def _count(self, session: _Session, action: machine.Finish) -> None:
        self._counters["pulls_ok" if action.outcome == machine.OK else "pulls_failed"] += 1
        self._counters["blocks_loaded"] += action.good_blocks
        self._counters["blocks_failed"] += len(action.bad)
        self._counters["checksum_mismatches"] += action.mismatches
        self._counters["bytes_received"] += session.received_bytes
        self._counters["bytes_hidden"] += session.hidden_bytes
        if session.transport:
            self._counters[f"pulls_by_{session.transport}"] += 1
        if action.outcome not in (machine.OK, "cancelled"):
            log.warning(
                "hand-off failed request=%s transfer=%s: %s; %d of %d blocks are recomputed",
                session.request.request_id, session.request.transfer, action.outcome, len(action.bad),
                len(session.request.block_ids),
            )  # fmt: skip

    # --- the readers -------------------------------------------------------------------------------

    def _reader(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                done = machine.ReadDone(job.read.attempt, job.read.span.seq, self._read(job))
            except MooncakeError as error:
                done = machine.ReadDone(job.read.attempt, job.read.span.seq, None, str(error))
            except Exception as error:
                log.exception("hand-off pull: a read broke transfer=%s", job.session.request.transfer)
                done = machine.ReadDone(job.read.attempt, job.read.span.seq, None, repr(error))
            self._inbox.put(partial(self._read_done, job, done))

    def _read_done(self, job: _ReadJob, done: machine.ReadDone) -> None:
        job.session.jobs.pop((done.attempt, done.seq), None)
        job.session.received_bytes += job.received_bytes
        self._dispatch(job.session.request.request_id, done)

    def _read(self, job: _ReadJob) -> UInt64Array:
        """Read one span in pieces that fit a cache, hashing each while it is warm."""
        session, span = job.session, job.read.span
        peer = self._peers.get(session.link)
        if peer is None:
            raise MooncakeError("the link to prefill is gone")
        session.transport = peer.path.transport
        first = session.request.first_block
        ours = session.request.block_ids[span.block0 - first : span.block1 - first]
        sums = [self._read_piece(job, peer, piece, ours) for piece in self._pieces(span)]
        return np.concatenate(sums)

    def _pieces(self, span: Span) -> Iterator[tuple[int, int, int, int]]:
        """Cut a span into ``(layer0, layer1, first, last)`` of at most ``read_bytes``, in its checksums' order."""
        layout, count = self._cache.layout, len(span.block_ids)
        layer_bytes = int(layout.block_bytes.max()) * count
        layers_a_piece = max(1, self._options.read_bytes // layer_bytes)
        blocks_a_piece = count if layers_a_piece > 1 else max(1, self._options.read_bytes * count // layer_bytes)
        for layer in range(span.layer0, span.layer1, layers_a_piece):
            for block in range(0, count, blocks_a_piece):
                yield layer, min(layer + layers_a_piece, span.layer1), block, min(block + blocks_a_piece, count)

    def _read_piece(
        self, job: _ReadJob, peer: Peer, piece: tuple[int, int, int, int], ours: tuple[int, ...]
    ) -> UInt64Array:
        layer0, layer1, block0, block1 = piece
        span, layout = job.read.span, self._cache.layout
        local_ids, remote_ids = ours[block0:block1], np.asarray(span.block_ids[block0:block1], np.int64)
        local = layout.offsets(layer0, layer1, np.asarray(local_ids, np.int64))
        lengths = layout.lengths(layer0, layer1, block1 - block0)
        job.transfer(self._engine, peer, local, job.remote.offsets(layer0, layer1, remote_ids), lengths)
        job.received_bytes += int(lengths.sum())
        if not self._options.verify:
            return np.zeros(len(lengths), np.uint64)
        seeds = span_seeds(job.session.request.transfer, layer0, layer1, span.block0 + block0, span.block0 + block1)
        return self._cache.checksums(layer0, layer1, local_ids, seeds)
