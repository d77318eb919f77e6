"""P's side of the hand-off in a worker process: the shell around ``PrefillSource``.

Three kinds of threads: the engine's own (calls ``begin_step``, ``layer_computed``, ``end_step``, ``take_finished``:
none blocks), one for each channel that a decode instance opened (reads messages), and the two of this service: ``main``
owns all state machines and sends, ``hash`` hashes spans. They talk through queues.

One thing is shared with a lock: which attempts are void. The engine thread sets it before it overwrites blocks;
``main`` looks at it after a span was hashed and before its commit is sent. So no commit vouches for bytes that were
overwritten.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mooncake_plugins.errors import DeadlineExceededError, FrameError, MooncakeError, PeerClosedError, TicketError
from mooncake_plugins.handoff import _messages as wire
from mooncake_plugins.handoff import _source as machine
from mooncake_plugins.handoff._cache import BlockCache
from mooncake_plugins.handoff._options import HandoffOptions
from mooncake_plugins.handoff._steps import HandoffStep, PrefillWork
from mooncake_plugins.handoff._ticket import Ticket, TicketBook, verify_ticket
from mooncake_plugins.kv import Coordinate, Fingerprint, fingerprint_differences, span_seeds
from mooncake_plugins.transfer import TransferEngine
from mooncake_plugins.wire import Channel

log = logging.getLogger(__name__)

_TICK_S = 0.1
_SEND_TIMEOUT_S = 1.0
_NEVER = 1 << 62
# How many ended transfers are remembered, so that who comes too late is told so instead of waiting.
_ENDED = 10_000


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """Who this worker is: the engine's instance id, what its KV is, and which part of it is here."""

    instance: str
    fingerprint: Fingerprint
    coordinate: Coordinate


class SourceService:
    """Serves KV of this worker's cache to decode workers.

    Args:
        engine: Its port carries the channels, and the reads.
        cache: This worker's KV cache.
        identity: Who this worker is.
        key: The cluster secret, empty without one; tickets are checked with it.
        options: Timeouts.

    Thread-safe where said. Owns its threads; ``close`` ends them.
    """

    def __init__(
        self, engine: TransferEngine, cache: BlockCache, identity: SourceIdentity, key: bytes, options: HandoffOptions
    ) -> None:
        self._cache, self._identity, self._key, self._options = cache, identity, key, options
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._hash_jobs: queue.SimpleQueue[tuple[str, machine.HashSpan] | None] = queue.SimpleQueue()
        self._sources: dict[str, machine.PrefillSource] = {}
        self._ended: dict[str, str] = {}
        self._request_ids: dict[str, str] = {}
        self._links: dict[int, Channel] = {}
        self._link_ids = itertools.count(1)
        self._books = {wire.Watch: TicketBook(), wire.Attach: TicketBook()}
        self._lock = threading.Lock()
        self._void_below: dict[str, int] = {}
        self._finished: set[str] = set()
        self._step_work: tuple[PrefillWork, ...] = ()
        self._counters: Counter[str] = Counter()
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._main, name="mooncake-source", daemon=True),
            threading.Thread(target=self._hash, name="mooncake-source-hash", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        engine.add_role(wire.HANDOFF_ROLE, self._serve_channel, message_type=wire.ToPrefill)

    # --- the engine's thread -----------------------------------------------------------------------

    def begin_step(self, step: HandoffStep) -> None:
        """Take what the scheduler decided, before the forward may overwrite blocks. Never blocks."""
        with self._lock:
            for transfer in (*step.preempted, *step.aborted):
                if transfer in self._void_below:
                    self._void_below[transfer] += 1
            for work in step.work:
                self._void_below.setdefault(work.transfer, 0)
        self._step_work = tuple(step.work)
        if step.preempted or step.aborted or step.work or step.held:
            self._inbox.put(partial(self._engine_step, step))

    def layer_computed(self, layer: int) -> None:
        """Say that this step's tokens have their KV in ``layer``. Never blocks."""
        if work := self._step_work:
            self._inbox.put(partial(self._computed, work, layer, layer + 1))

    def end_step(self) -> None:
        """Say that the forward is done: all layers have this step's KV, also those without a hook. Never blocks."""
        if work := self._step_work:
            self._step_work = ()
            self._inbox.put(partial(self._computed, work, 0, self._cache.layout.num_layers))

    def take_finished(self) -> set[str]:
        """Return the ids of held requests whose blocks may be freed, each once."""
        with self._lock:
            finished, self._finished = self._finished, set()
        return finished

    @property
    def live_transfers(self) -> int:
        """Transfers that have not ended."""
        return len(self._sources)

    @property
    def counters(self) -> Counter[str]:
        """What was counted since the start: a copy."""
        return Counter(self._counters)

    def close(self) -> None:
        """End the channels and threads; what is held is not waited for. Idempotent."""
        if self._is_closing:
            return
        self._is_closing = True
        self._inbox.put(None)
        self._hash_jobs.put(None)
        for channel in list(self._links.values()):
            channel.close()
        for thread in self._threads:
            thread.join(timeout=5.0)

    # --- channels ----------------------------------------------------------------------------------

    def _serve_channel(self, channel: Channel) -> None:
        """Read one decode instance's messages until it leaves or falls silent."""
        link = next(self._link_ids)
        self._links[link] = channel
        try:
            while not self._is_closing:
                message = channel.recv(timeout_s=self._options.peer_timeout_s)
                self._inbox.put(partial(self._message, link, message))
        except (PeerClosedError, DeadlineExceededError, FrameError) as error:
            log.debug("hand-off channel ended link=%s peer=%s: %s", link, channel.peer.address, error)
        finally:
            self._inbox.put(partial(self._link_lost, link))

    def _send(self, link: int, message: wire.ToDecode) -> None:
        channel = self._links.get(link)
        if channel is None:
            return
        try:
            channel.send(message, timeout_s=_SEND_TIMEOUT_S)
        except MooncakeError as error:
            log.warning("cannot tell decode link=%s: %s", link, error)
            channel.close()

    # --- the main thread ---------------------------------------------------------------------------

    def _main(self) -> None:
        next_tick = time.monotonic()
        while True:
            try:
                item = self._inbox.get(timeout=max(0.0, next_tick - time.monotonic()))
                if item is None:
                    return
                item()
            except queue.Empty:
                pass
            except Exception:
                log.exception("hand-off source: an event could not be handled")
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + _TICK_S
                self._tick()

    def _tick(self) -> None:
        for transfer in list(self._sources):
            self._dispatch(transfer, machine.Tick())

    def _engine_step(self, step: HandoffStep) -> None:
        for transfer in step.preempted:
            self._dispatch(transfer, machine.Preempted())
        for transfer in step.aborted:
            self._aborted(transfer)
        for work in step.work:
            self._take_work(work)
        for transfer, request_id in step.held:
            self._hold(transfer, request_id)

    def _take_work(self, work: PrefillWork) -> None:
        self._request_ids[work.transfer] = work.request_id
        if not work.is_first:
            self._dispatch(work.transfer, machine.Extended(work.block_ids))
            return
        self._counters["blocks_cached"] += work.cached_blocks
        if work.transfer not in self._sources:
            self._new_source(work.transfer, time.monotonic() + work.expires_in_s)
        self._dispatch(work.transfer, machine.Scheduled(work.prompt, work.tokens, work.block_ids))

    def _aborted(self, transfer: str) -> None:
        if transfer in self._sources:
            self._dispatch(transfer, machine.PrefillEnded(ok=False))
        else:
            self._remember_end(transfer, "the prefill was aborted")

    def _hold(self, transfer: str, request_id: str) -> None:
        if transfer in self._sources:
            self._request_ids[transfer] = request_id
            self._dispatch(transfer, machine.PrefillEnded(ok=True))
        else:
            self._free(request_id)

    def _computed(self, work: tuple[PrefillWork, ...], layer0: int, layer1: int) -> None:
        for one in work:
            self._dispatch(one.transfer, machine.Computed(layer0, layer1, one.blocks_after))

    def _message(self, link: int, message: wire.ToPrefill) -> None:
        match message:
            case wire.Ping():
                self._send(link, wire.Pong(message.number))
            case wire.Watch():
                self._admit(link, message, machine.Watched(link, message.prompt, message.tokens))
            case wire.Attach():
                event = machine.Attached(link, message.prompt, message.tokens, message.first_block)
                self._admit(link, message, event)
            case wire.Fetched():
                self._dispatch(message.transfer, machine.Fetched(link, message.attempt, message.seq))
            case wire.Release():
                self._dispatch(message.transfer, machine.Released(link))

    def _admit(self, link: int, message: wire.Watch | wire.Attach, event: machine.Watched | machine.Attached) -> None:
        """Let a consumer in, or say why not."""
        refusal = self._refusal(message)
        if refusal is not None:
            self._counters[f"refused_{refusal[0]}"] += 1
            log.warning("hand-off refused transfer=%s reason=%s: %s", message.transfer, *refusal)
            self._send(link, wire.Refused(message.transfer, *refusal))
            return
        self._dispatch(message.transfer, event)

    def _refusal(self, message: wire.Watch | wire.Attach) -> tuple[str, str] | None:
        now = time.time()
        try:
            ticket = verify_ticket(message.ticket, self._key, now)
            if ticket.prefill != self._identity.instance:
                return (
                    "instance",
                    f"the ticket is for prefill instance {ticket.prefill}, this is {self._identity.instance}",
                )
            if ticket.id != message.transfer:
                return "malformed", "the ticket names another transfer"
            self._books[type(message)].use(ticket, now)
        except TicketError as error:
            return error.reason, str(error)
        differences = fingerprint_differences(message.fingerprint, self._identity.fingerprint)
        if differences:
            listed = "; ".join(
                f"{name} is {d!r} on decode and {p!r} on prefill" for name, (d, p) in differences.items()
            )
            return "fingerprint", listed
        if isinstance(message, wire.Attach) and message.coordinate != str(self._identity.coordinate):
            return "coordinate", f"this worker is {self._identity.coordinate}, asked for {message.coordinate}"
        if ticket.id in self._ended:
            return "ended", f"this transfer has ended: {self._ended[ticket.id]}"
        self._ensure_source(ticket, now)
        return None

    def _ensure_source(self, ticket: Ticket, now: float) -> None:
        if ticket.id not in self._sources:
            self._new_source(ticket.id, time.monotonic() + ticket.expires_at - now)

    def _new_source(self, transfer: str, expires_at: float) -> None:
        layers = self._cache.layout.num_layers
        self._ended.pop(transfer, None)
        with self._lock:
            self._void_below.setdefault(transfer, 0)
        self._sources[transfer] = machine.PrefillSource(
            transfer, layers, expires_at=expires_at, lease_s=self._options.lease_s
        )

    def _link_lost(self, link: int) -> None:
        self._links.pop(link, None)
        for transfer in list(self._sources):
            self._dispatch(transfer, machine.LinkLost(link))

    # --- performing what the machines decide -------------------------------------------------------

    def _dispatch(self, transfer: str, event: machine.SourceEvent) -> None:
        source = self._sources.get(transfer)
        if source is not None:
            for action in source.handle(event, time.monotonic()):
                self._perform(transfer, action)

    def _perform(self, transfer: str, action: machine.SourceAction) -> None:
        match action:
            case machine.Tell():
                self._tell(transfer, action)
            case machine.TellLayout():
                self._send(action.link, self._attached(transfer, action.attempt))
            case machine.HashSpan():
                self._hash_jobs.put((transfer, action))
            case machine.FreeBlocks():
                self._free(self._request_ids.get(transfer, ""))
            case machine.Forget():
                self._forget(transfer, action.reason)

    def _tell(self, transfer: str, action: machine.Tell) -> None:
        if isinstance(action.message, wire.Commit):
            if not self._is_valid(transfer, action.message.attempt):
                self._counters["commits_withheld"] += 1
                return
            self._counters["commits"] += 1
        self._send(action.link, action.message)

    def _is_valid(self, transfer: str, attempt: int) -> bool:
        """Tell whether the engine has not taken the blocks of this attempt away."""
        with self._lock:
            return attempt >= self._void_below.get(transfer, _NEVER)

    def _attached(self, transfer: str, attempt: int) -> wire.Attached:
        layout = self._cache.layout
        columns = (layout.base.tolist(), layout.stride.tolist(), layout.block_bytes.tolist())
        return wire.Attached(transfer, attempt, *columns, layout.num_blocks)

    def _free(self, request_id: str) -> None:
        with self._lock:
            self._finished.add(request_id)

    def _forget(self, transfer: str, reason: str) -> None:
        del self._sources[transfer]
        self._request_ids.pop(transfer, None)
        self._remember_end(transfer, reason)
        with self._lock:
            self._void_below.pop(transfer, None)
        self._counters["transfers_done" if reason == "done" else "transfers_withdrawn"] += 1
        if reason != "done":
            log.warning("hand-off withdrawn transfer=%s: %s", transfer, reason)

    def _remember_end(self, transfer: str, reason: str) -> None:
        self._ended[transfer] = reason
        if len(self._ended) > _ENDED:
            del self._ended[next(iter(self._ended))]

    # --- the hash thread ---------------------------------------------------------------------------

    def _hash(self) -> None:
        while (job := self._hash_jobs.get()) is not None:
            transfer, action = job
            try:
                hashed = machine.Hashed(action.attempt, action.span.seq, self._checksums(transfer, action.span))
                self._inbox.put(partial(self._dispatch, transfer, hashed))
            except Exception:
                log.exception("hand-off source: a span could not be hashed transfer=%s", transfer)

    def _checksums(self, transfer: str, span: machine.Span) -> machine.UInt64Array:
        seeds = span_seeds(transfer, span.layer0, span.layer1, span.block0, span.block1)
        return self._cache.checksums(span.layer0, span.layer1, span.block_ids, seeds)
