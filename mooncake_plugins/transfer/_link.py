"""All traffic with one incarnation of a peer: a queue, a few mover threads, and a few endpoints.

A mover takes a work and an endpoint at the same time, so there are never more connections than
`connections_per_peer`, whoever moves. ``run_here`` lets a caller that waits anyway do the work in its own thread,
without a hand-over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mooncake_plugins.errors import PeerClosedError
from mooncake_plugins.transports import Endpoint, Work
from mooncake_plugins.wire import Deadline

from ._batch import Batch

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Slot:
    """A place for one endpoint; whoever holds the slot owns it."""

    endpoint: Endpoint | None = None
    batch: Batch | None = None  # on whose behalf the endpoint works
    last_used: float = 0.0


class Link:
    """Moves works to and from one peer. Thread-safe."""

    def __init__(
        self,
        name: str,
        connect: Callable[[Deadline], Endpoint],
        connections: int,
        idle_timeout_s: float,
        connect_timeout_s: float,
        count: Callable[[str, int], None],
    ) -> None:
        self._name, self._connect, self._count = name, connect, count
        self._idle_timeout_s, self._connect_timeout_s = idle_timeout_s, connect_timeout_s
        self._changed = threading.Condition()
        self._queue: deque[tuple[Batch, Work]] = deque()
        self._free = [Slot() for _ in range(connections)]
        self._slots = tuple(self._free)
        self._movers: set[threading.Thread] = set()
        self._idle_movers = 0
        self._is_closed = False
        self.gone: PeerClosedError | None = None

    def put(self, batch: Batch, works: list[Work]) -> None:
        """Queue the works of a batch; starts movers as needed."""
        with self._changed:
            if self._is_closed:
                raise PeerClosedError("the peer was closed on this side")
            self._queue.extend((batch, work) for work in works)
            wanted = min(len(self._queue), len(self._slots)) - self._idle_movers
            for _ in range(min(wanted, len(self._slots) - len(self._movers))):
                self._start_mover()
            self._changed.notify(len(works))

    def _start_mover(self) -> None:
        mover = threading.Thread(target=self._move, name=f"mooncake-mover-{self._name}", daemon=True)
        self._movers.add(mover)
        mover.start()

    def run_here(self, batch: Batch, work: Work) -> bool:
        """Do a work in the calling thread if an endpoint is free and nothing is queued; False: nothing was done."""
        with self._changed:
            if self._is_closed or self._queue or not self._free:
                return False
            slot = self._take_slot()
        self._perform(slot, batch, work)
        return True

    def _take_slot(self) -> Slot:
        """The free slot used last: its connection is the warmest."""
        slot = max(self._free, key=lambda free: free.last_used)
        self._free.remove(slot)
        return slot

    def _give_slot(self, slot: Slot) -> None:
        with self._changed:
            slot.last_used = time.monotonic()
            self._free.append(slot)
            self._changed.notify_all()

    def _move(self) -> None:
        """A mover's life: works until it has been idle for long or the link is closed."""
        try:
            while (taken := self._take()) is not None:
                slot, batch, work = taken
                self._perform(slot, batch, work)
            self.sweep()
        finally:
            with self._changed:
                self._movers.discard(threading.current_thread())

    def _take(self) -> tuple[Slot, Batch, Work] | None:
        with self._changed:
            self._idle_movers += 1
            try:
                ready = self._changed.wait_for(
                    lambda: self._is_closed or (self._queue and self._free), self._idle_timeout_s
                )
                if not ready or self._is_closed:
                    # Leaving under the same lock as `put` counts movers, so no work is left without one.
                    self._movers.discard(threading.current_thread())
                    return None
                batch, work = self._queue.popleft()
                return self._take_slot(), batch, work
            finally:
                self._idle_movers -= 1

    def _perform(self, slot: Slot, batch: Batch, work: Work) -> None:
        try:
            if not batch.status_allows_work:
                return
            try:
                endpoint, is_reused = self._endpoint(slot, work)
            except Exception as error:  # noqa: BLE001 - a third-party transport may raise anything
                batch.fail_early(error)
                return
            if self._enter(slot, batch):
                self._execute(slot, endpoint, batch, work, is_reused)
        finally:
            self._give_slot(slot)

    def _enter(self, slot: Slot, batch: Batch) -> bool:
        with self._changed:  # so that `interrupt` sees the batch, or `begin_work` says no
            if not batch.begin_work():
                return False
            slot.batch = batch
            return True

    def _execute(self, slot: Slot, endpoint: Endpoint, batch: Batch, work: Work, is_reused: bool) -> None:
        try:
            try:
                endpoint.execute(work)
            except PeerClosedError:
                # The peer may have dropped an idle connection just now. Nothing else is retried at this level.
                if not is_reused or batch.is_stopping:
                    raise
                self._count("retries", 1)
                self._execute_again(slot, batch, work)
        except BaseException as error:
            self._leave(slot)
            batch.fail_work(work, error)
            if not isinstance(error, Exception):
                raise
        else:
            self._leave(slot)
            batch.end_work(work.total_bytes)

    def _execute_again(self, slot: Slot, batch: Batch, work: Work) -> None:
        self._drop(slot)
        endpoint, _ = self._endpoint(slot, work)
        if batch.is_stopping:
            raise PeerClosedError("the transfer was interrupted on this side")
        endpoint.execute(work)

    def _leave(self, slot: Slot) -> None:
        with self._changed:
            slot.batch = None

    def _endpoint(self, slot: Slot, work: Work) -> tuple[Endpoint, bool]:
        """The slot's endpoint, connected anew if it is not usable; True when it was used before."""
        if slot.endpoint is not None and slot.endpoint.is_usable:
            return slot.endpoint, True
        self._drop(slot)
        if self.gone is not None:
            raise self.gone
        deadline = Deadline(min(self._connect_timeout_s, work.deadline.remaining_s))
        try:
            endpoint = self._connect(deadline)
        except PeerClosedError as error:
            if error.was_restarted:
                self.gone = error
            raise
        self._count("connects", 1)
        with self._changed:
            slot.endpoint = endpoint
        return endpoint, False

    def _drop(self, slot: Slot) -> None:
        with self._changed:
            endpoint, slot.endpoint = slot.endpoint, None
        if endpoint is not None:
            endpoint.close()

    def interrupt(self, batch: Batch) -> None:
        """Make every mover that works on a batch stop soon. Does not block."""
        with self._changed:
            for slot in self._slots:
                if slot.batch is batch and slot.endpoint is not None:
                    slot.endpoint.interrupt()

    def sweep(self) -> None:
        """Close idle connections that are broken or old."""
        now = time.monotonic()
        with self._changed:
            stale = [slot for slot in self._free if self._is_stale(slot, now)]
            dropped = [slot.endpoint for slot in stale]
            for slot in stale:
                slot.endpoint = None
        for endpoint in dropped:
            if endpoint is not None:
                endpoint.close()

    def _is_stale(self, slot: Slot, now: float) -> bool:
        if slot.endpoint is None:
            return False
        return now - slot.last_used >= self._idle_timeout_s or not slot.endpoint.is_usable

    @property
    def is_idle(self) -> bool:
        """True when nothing is queued or under way."""
        with self._changed:
            return not self._queue and len(self._free) == len(self._slots)

    @property
    def open_connections(self) -> int:
        """Endpoints that exist."""
        return sum(slot.endpoint is not None for slot in self._slots)

    def close(self, deadline: Deadline) -> None:
        """Fail what is queued, stop movers, close connections. Batches under way are interrupted. Idempotent."""
        with self._changed:
            self._is_closed = True
            queued, self._queue = list(self._queue), deque()
            for slot in self._slots:
                if slot.batch is not None and slot.endpoint is not None:
                    slot.endpoint.interrupt()
            self._changed.notify_all()
            movers = list(self._movers)
        for batch, _ in queued:
            batch.fail_early(PeerClosedError("the peer was closed on this side"))
        for mover in movers:
            if mover is not threading.current_thread():
                mover.join(deadline.remaining_s)
        self._close_free(deadline)

    def _close_free(self, deadline: Deadline) -> None:
        with self._changed:
            is_quiet = self._changed.wait_for(lambda: len(self._free) == len(self._slots), deadline.remaining_s)
            slots = list(self._free)
        for slot in slots:
            self._drop(slot)
        if not is_quiet:
            log.warning("a transfer did not stop in time peer=%s", self._name)
