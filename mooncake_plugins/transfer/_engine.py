"""The Transfer Engine: registers memory, opens peers, moves batches, gives grants."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mooncake_plugins.errors import (
    ClosedError,
    DeadlineExceededError,
    IntegrityError,
    LocalUsageError,
    MooncakeError,
    PeerClosedError,
)
from mooncake_plugins.metadata import MetadataBackend
from mooncake_plugins.transports import (
    Capability,
    Integrity,
    Listener,
    Opcode,
    Rights,
    SegmentDescription,
)
from mooncake_plugins.wire import (
    Address,
    Agreed,
    Channel,
    Deadline,
    Identity,
    ListenerLimits,
    RoleListener,
    Stream,
    new_incarnation,
    parse_address,
)

from ._batch import Batch
from ._batch_machine import BatchStatus
from ._counters import Counters
from ._grants import Fence, Grant, GrantTable
from ._host import EngineHost
from ._link import Link
from ._loading import load_metadata, load_transports, registry_or_default
from ._options import EngineOptions
from ._peer import Peer
from ._peers import PeerTable
from ._planning import Plan, plan_batch
from ._ranges import ArrayLike, as_int64, check_lengths, check_sizes
from ._regions import Region, RegionTable

if TYPE_CHECKING:
    from mooncake_plugins.plugins import PluginRegistry

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0


class TransferEngine:
    """One segment of registered memory, one port, and any number of peers.

    All methods are thread-safe. Use as a context manager, or call ``close``.
    """

    def __init__(self, options: EngineOptions | None = None, *, registry: PluginRegistry | None = None) -> None:
        """Listen on the port and start the transports.

        Raises:
            ConfigError: A setting cannot be used; nothing is left open.
            ProviderUnavailableError: A transport that was asked for lacks what it needs.
        """
        self._options = options = EngineOptions() if options is None else options
        plugins = registry_or_default(registry)
        self._transports = load_transports(plugins, options.transports)
        backend, location = load_metadata(plugins, options.metadata)
        limits = ListenerLimits(options.handshake_timeout_s, options.max_connections, options.max_pending_handshakes)
        self._listener = RoleListener(options.listen, options.secret, limits)
        self._identity = self._make_identity()
        self._counters = Counters()
        self._regions = RegionTable()
        self._listeners: dict[str, Listener] = {}
        self._grants = GrantTable(
            options.max_grants,
            options.quarantine_limit_bytes,
            lambda: tuple(self._listeners.values()),
            self._counters.add,
        )
        self._host = EngineHost(
            self._identity, options.secret, self._listener, self._regions, self._grants, self._counters
        )
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._batches: dict[Batch, Callable[[], None]] = {}
        self._peers = PeerTable(self._transports, self._host, options, self._counters.add)
        self._channels: weakref.WeakSet[Channel] = weakref.WeakSet()
        self._is_closing = False
        self._start(backend, location)

    def _make_identity(self) -> Identity:
        bound = self._listener.address
        advertised = self._options.advertise
        address = str(parse_address(advertised, "advertise")) if advertised else str(Address(bound.host, bound.port))
        return Identity(self._options.segment or address, new_incarnation(), address)

    def _start(self, backend: type[MetadataBackend], location: str) -> None:
        try:
            self._metadata = backend(self._host, location)
            for name, transport in self._transports.items():
                self._listeners[name] = transport.listen(self._host)
                self._host.transports[name] = self._listeners[name].description
            self._listener.start(self._identity)
            self._metadata.publish()
        except BaseException:
            for listener in self._listeners.values():
                listener.close()
            self._listener.close()
            raise

    # -- who we are

    @property
    def address(self) -> str:
        """host:port that peers use."""
        return self._identity.address

    @property
    def segment(self) -> str:
        """The name of this engine's segment."""
        return self._identity.segment

    @property
    def incarnation(self) -> str:
        """This life of the engine: 32 hex digits, new for every engine."""
        return self._identity.incarnation

    @property
    def options(self) -> EngineOptions:
        """The settings it was made with."""
        return self._options

    @property
    def description(self) -> SegmentDescription:
        """This engine's segment, as peers see it."""
        return self._host.description

    # -- memory

    def register(self, buffer: Any, rights: Rights = Rights.READ | Rights.WRITE, name: str = "") -> Region:
        """Give a buffer a place in this segment.

        The engine keeps the buffer alive until ``unregister``. Its bytes are never copied. Peers may read it if
        ``rights`` say so, and write those ranges for which they hold a grant.

        Args:
            buffer: Anything with the buffer protocol (bytearray, mmap, memoryview) or a C-contiguous numpy array.
            rights: What peers may do.
            name: For people, and for peers to find it in ``Peer.regions``.

        Raises:
            LocalUsageError: Not a contiguous buffer, empty, or read-only with the right WRITE.
            ClosedError: The engine is closed.
        """
        self._check_open()
        region = self._regions.add(buffer, rights, name)
        address = self._regions.address_of(region)
        handles = {n: listener.export(address, region.length, "memory") for n, listener in self._listeners.items()}
        self._regions.set_handles(region, {n: handle for n, handle in handles.items() if handle})
        self._metadata.publish()
        return region

    def unregister(self, region: Region, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Take a buffer out of the segment, once nobody uses it.

        New uses are refused at once, and grants that cover the region are revoked; batches and peers that use it are
        waited for.

        Raises:
            DeadlineExceededError: It is still in use (or a revoked writer is not fenced); it stays registered.
            ClosedError: It is not registered here.

        Blocking: up to ``timeout_s``.
        """
        deadline = Deadline(timeout_s)
        self._regions.close_region(region)
        try:
            self._fence_region(region, deadline)
            self._regions.remove(region, deadline)
        except DeadlineExceededError:
            self._regions.reopen_region(region)
            raise
        self._metadata.publish()

    def _fence_region(self, region: Region, deadline: Deadline) -> None:
        for grant in self._grants.overlapping(region.offset, region.offset + region.length):
            if self._grants.revoke(grant, deadline) is not Fence.FENCED:
                raise DeadlineExceededError(f"a writer to region {region.name!r} is not fenced yet")
        address = self._regions.address_of(region)
        for listener in self._listeners.values():
            listener.withdraw(address, region.length)

    # -- peers

    def open(self, address: str, *, timeout_s: float) -> Peer:
        """Find a peer and the best way to it.

        Args:
            address: host:port of the peer's engine, or its segment's name with a metadata backend that knows names.
            timeout_s: How long to try.

        Raises:
            PeerClosedError: Nobody answers, or no transport reaches it.
            MetadataError: The name is unknown.
            HandshakeError: Wrong secret or version.
            DeadlineExceededError: No answer in time.
            ClosedError: This engine is closed.

        Blocking: up to ``timeout_s``.
        """
        self._check_open()
        self._peers.sweep()
        return self._peers.open(self._metadata.resolve(address, Deadline(timeout_s)))

    # -- transfers

    def submit(
        self,
        peer: Peer,
        opcode: Opcode,
        local: ArrayLike,
        remote: ArrayLike,
        lengths: ArrayLike,
        *,
        deadline_s: float,
        grant: bytes | None = None,
        integrity: Integrity | None = None,
    ) -> Batch:
        """Queue one batch of transfers with a peer and return at once.

        Neighbours that are contiguous on both sides are merged, then the batch is cut in slices and spread over the
        connections; order is not kept. The local ranges must stay registered and, for a WRITE, unchanged until the
        batch is terminal. Local ranges of a READ must not overlap each other.

        Args:
            peer: An open peer.
            opcode: READ moves remote to local; WRITE local to remote and needs ``grant``.
            local: int64[n], byte offsets in this side's segment.
            remote: int64[n], byte offsets in the peer's.
            lengths: int64[n], bytes, > 0.
            deadline_s: Seconds from now; after it the batch is FAILED.
            grant: Token of a grant of the peer; only for WRITE.
            integrity: Checksums for this batch; None: as in the options.

        Raises:
            OutOfBoundsError: A local range is not registered (first one in ``.index``); nothing was queued.
            LocalUsageError: Arrays are empty, differ in length or hold a length below 1; a grant is missing; or the
                transport cannot do that (``capabilities``).
            PeerClosedError: The peer was found to be restarted; nothing was queued.
            ClosedError: The peer or this engine was closed here.

        Blocking: never.
        """
        batch, link, plan = self._prepare(peer, opcode, local, remote, lengths, deadline_s, grant, integrity)
        self._queue(batch, link, plan)
        return batch

    def _prepare(
        self,
        peer: Peer,
        opcode: Opcode,
        local: ArrayLike,
        remote: ArrayLike,
        lengths: ArrayLike,
        deadline_s: float,
        grant: bytes | None,
        integrity: Integrity | None,
    ) -> tuple[Batch, Link, Plan]:
        self._check_peer(peer)
        link = peer.link
        options = self._options
        integrity = options.integrity if integrity is None else integrity
        self._check_abilities(peer, opcode, integrity)
        plan = plan_batch(
            self._regions,
            opcode,
            local,
            remote,
            lengths,
            Deadline(deadline_s),
            grant,
            integrity,
            options.connections_per_peer,
            options.slice_bytes,
        )
        batch = Batch(
            opcode,
            peer.path.transport,
            plan.total_bytes,
            len(plan.works),
            plan.deadline,
            link.interrupt,
            self._finish,
            plan.name_entries,
        )
        self._counters.add("batches_submitted")
        self._counters.add("ranges_submitted", plan.entries)
        self._counters.add("works_submitted", len(plan.works))
        with self._lock:
            if self._is_closing:
                plan.pin.release()
                raise ClosedError("the engine is closed")
            self._batches[batch] = plan.pin.release
        return batch, link, plan

    def _queue(self, batch: Batch, link: Link, plan: Plan) -> None:
        try:
            link.put(batch, plan.works)
        except PeerClosedError as error:
            batch.fail_early(error)

    def _check_peer(self, peer: Peer) -> None:
        self._check_open()
        if peer.is_closed:
            raise ClosedError(f"peer {peer.segment} was closed on this side")
        if peer.link.gone is not None:
            raise PeerClosedError(str(peer.link.gone), was_restarted=True)

    def _check_abilities(self, peer: Peer, opcode: Opcode, integrity: Integrity) -> None:
        can = self._transports[peer.path.transport].capabilities
        needed = {Capability.WRITE if opcode is Opcode.WRITE else Capability.READ}
        if integrity is not Integrity.NONE:
            needed.add(Capability.INTEGRITY)
        if not needed <= can:
            missing = ", ".join(sorted(capability.value for capability in needed - can))
            raise LocalUsageError(f"{peer.path.transport}, in use with {peer.segment}, does not offer: {missing}")

    def _finish(self, batch: Batch) -> None:
        """A batch is terminal: nothing touches its memory any more."""
        with self._quiet:
            release = self._batches.pop(batch, None)
            self._quiet.notify_all()
        if release is not None:
            release()
        status = batch.final_status
        self._counters.add(f"batches_{status.value}")
        self._counters.add("bytes_read" if batch.opcode is Opcode.READ else "bytes_written", batch.bytes_done)
        if isinstance(batch.error, IntegrityError):
            self._counters.add("integrity_failures")

    def read(
        self,
        peer: Peer,
        local: ArrayLike,
        remote: ArrayLike,
        lengths: ArrayLike,
        *,
        deadline_s: float,
        integrity: Integrity | None = None,
    ) -> None:
        """Move remote ranges to local memory and return when all is there; arguments and errors as `submit`.

        Raises:
            MooncakeError: The transfer failed; local memory is not touched any more.

        Blocking: up to ``deadline_s``.
        """
        self._run(self._prepare(peer, Opcode.READ, local, remote, lengths, deadline_s, None, integrity))

    def write(
        self,
        peer: Peer,
        local: ArrayLike,
        remote: ArrayLike,
        lengths: ArrayLike,
        *,
        grant: bytes,
        deadline_s: float,
        integrity: Integrity | None = None,
    ) -> None:
        """Move local ranges to granted remote memory and return when all is there; arguments and errors as `submit`.

        Raises:
            MooncakeError: The transfer failed; local memory is not read any more.

        Blocking: up to ``deadline_s``.
        """
        self._run(self._prepare(peer, Opcode.WRITE, local, remote, lengths, deadline_s, grant, integrity))

    def _run(self, prepared: tuple[Batch, Link, Plan]) -> None:
        batch, link, plan = prepared
        if len(plan.works) > 1 or not link.run_here(batch, plan.works[0]):
            self._queue(batch, link, plan)
        while (status := batch.wait(max(1.0, batch.deadline.remaining_s))) is BatchStatus.PENDING:
            continue  # the deadline has passed; the mover is about to stop
        if status is not BatchStatus.DONE:
            raise batch.error or PeerClosedError("the batch was cancelled")

    # -- grants

    def grant(
        self, offsets: ArrayLike, lengths: ArrayLike, *, deadline_s: float, peer: Peer | str | None = None
    ) -> Grant:
        """Let peers write ranges of this segment until the deadline, or until revoked.

        Args:
            offsets: int64[n], byte offsets in this segment.
            lengths: int64[n], bytes, > 0; ranges must not overlap.
            deadline_s: Seconds from now, after which writes are refused. The ranges may be used again after
                ``revoke`` said FENCED.
            peer: The only one that may write: an open peer, or its incarnation; None: whoever has the token.

        Raises:
            OutOfBoundsError: A range is not registered with the right WRITE.
            QuarantineFullError: Too many bytes of revoked grants are not fenced yet.
            LocalUsageError: The arrays cannot be used, or too many grants are open.
        """
        self._check_open()
        starts, sizes = as_int64(offsets, "offsets"), as_int64(lengths, "lengths")
        check_sizes(offsets=starts, lengths=sizes)
        check_lengths(sizes)
        self._regions.pin("local", starts, sizes, Rights.WRITE, writes=True).release()
        only = peer.incarnation if isinstance(peer, Peer) else peer
        return self._grants.open(starts, sizes, Deadline(deadline_s), only)

    @property
    def quarantined_bytes(self) -> int:
        """Bytes of revoked grants that a writer may still reach."""
        return self._grants.settle()

    # -- other roles on this port

    def add_role(self, role: str, handler: Callable[[Channel], None], *, message_type: Any) -> None:
        """Serve connections of a role of the caller's own.

        ``handler(channel)`` runs in a thread of its own for each connection, and ends it by returning or raising.

        Args:
            role: Its name.
            handler: Called once per connection.
            message_type: What ``channel.recv`` returns: a msgspec type, e.g. a union of tagged Structs.

        Raises:
            ConfigError: The role is taken.
        """

        def serve(stream: Stream, agreed: Agreed) -> None:
            with Channel(stream, agreed, message_type) as channel:
                handler(channel)

        self._listener.add_role(role, serve)

    def connect(self, address: str, role: str, *, message_type: Any, timeout_s: float) -> Channel:
        """Open a channel to a role of a peer. The caller closes it; ``close`` of the engine does so too.

        Raises:
            PeerClosedError: Nobody answers.
            HandshakeError: Wrong secret or version, or the peer has no such role.
            DeadlineExceededError: No answer in time.
        """
        self._check_open()
        channel = Channel(*self._host.dial_address(address, role, Deadline(timeout_s)), message_type)
        with self._lock:
            self._channels.add(channel)
            is_late = self._is_closing
        if is_late:
            channel.close()
            raise ClosedError("the engine is closed")
        return channel

    # -- the rest

    def metrics(self) -> dict[str, int | float]:
        """Counters since the start, and what is open now."""
        links = self._peers.links()
        with self._lock:
            pending = len(self._batches)
        values: dict[str, int | float] = dict(self._counters.values())
        values.update(self._listener.counters)
        values["batches_pending"] = pending
        values["connections_out"] = sum(link.open_connections for link in links)
        values["connections_in"] = self._listener.open_connections
        values["peers"] = len(links)
        values["grants_open"] = self._grants.open_grants
        values["quarantined_bytes"] = self.quarantined_bytes
        values["registered_bytes"] = self._regions.registered_bytes
        return values

    def _check_open(self) -> None:
        if self._is_closing:
            raise ClosedError("the engine is closed")

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Let batches finish, then give everything back. Idempotent.

        Blocking: up to about ``timeout_s``; batches that are not done by then are cancelled.
        """
        deadline = Deadline(timeout_s)
        with self._quiet:
            self._is_closing = True
            self._quiet.wait_for(lambda: not self._batches, deadline.remaining_s)
        self.abort()

    def abort(self) -> None:
        """Cancel batches and give everything back at once. Idempotent."""
        with self._lock:
            self._is_closing = True
            batches, channels = list(self._batches), list(self._channels)
        for batch in batches:
            batch.cancel()
        deadline = Deadline(CLOSE_TIMEOUT_S)
        self._peers.close(deadline)
        for channel in channels:
            channel.close()
        self._close_target_side(deadline)

    def _close_target_side(self, deadline: Deadline) -> None:
        self._grants.revoke_all(deadline)
        try:
            self._metadata.close()
        except MooncakeError as error:
            log.warning("metadata could not be withdrawn segment=%s error=%s", self.segment, error)
        for listener in self._listeners.values():
            listener.close()
        self._listener.close(deadline.remaining_s)
        with self._quiet:
            is_quiet = self._quiet.wait_for(lambda: not self._batches, deadline.remaining_s)
        if is_quiet:
            self._regions.clear()

    def __enter__(self) -> TransferEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TransferEngine(segment={self.segment!r}, address={self.address}, transports={list(self._transports)})"
