"""loopback: between engines of one process, by copying.

A real transport with the same admissions, grants and fences as the others; the copying thread is the initiator's.
"""

from __future__ import annotations

import ctypes
import threading
from typing import ClassVar

from mooncake_plugins.errors import (
    DeadlineExceededError,
    GrantError,
    IntegrityError,
    PeerClosedError,
)
from mooncake_plugins.wire import Deadline, Identity

from ._checksums import Pieces
from ._interface import Admission, Endpoint, Listener, Reach, Transport, TransportHost, Work, WriteAdmission
from ._types import CHUNK_BYTES, Capability, Integrity, Opcode, SegmentDescription

__all__ = ["LoopbackTransport"]

_hosts: dict[str, TransportHost] = {}
_hosts_lock = threading.Lock()


def _find(incarnation: str) -> TransportHost:
    with _hosts_lock:
        host = _hosts.get(incarnation)
    if host is None:
        raise PeerClosedError("the engine in this process was closed")
    return host


class LoopbackListener(Listener):
    """Makes an engine known to the other engines of its process."""

    def __init__(self, host: TransportHost) -> None:
        self._incarnation = host.description.incarnation
        with _hosts_lock:
            _hosts[self._incarnation] = host

    @property
    def description(self) -> dict[str, str]:
        """The incarnation, known from elsewhere, is all that is needed."""
        return {}

    def close(self) -> None:
        """Forget the engine."""
        with _hosts_lock:
            _hosts.pop(self._incarnation, None)


class LoopbackEndpoint(Endpoint):
    """Copies between two engines of this process."""

    def __init__(self, me: Identity, incarnation: str) -> None:
        self._me = me
        self._incarnation = incarnation
        self._is_interrupted = False

    @property
    def is_usable(self) -> bool:
        """True while both engines are open."""
        with _hosts_lock:
            return not self._is_interrupted and self._incarnation in _hosts

    def execute(self, work: Work) -> None:
        """Perform one work; see `Endpoint.execute`."""
        target = _find(self._incarnation)
        if work.opcode is Opcode.READ:
            with target.admit_read(self._me, work.remote, work.lengths) as admission:
                self._copy(work, admission, None)
            target.count("bytes_served_read", work.total_bytes)
        else:
            with target.admit_write(self._me, work.token, work.remote, work.lengths) as admission:
                self._copy(work, admission, admission)
            target.count("bytes_served_write", work.total_bytes)

    def _copy(self, work: Work, admission: Admission, gate: WriteAdmission | None) -> None:
        theirs, ours = admission.addresses, work.addresses
        to, source = (theirs, ours) if gate is not None else (ours, theirs)
        before = after = None
        if work.integrity is not Integrity.NONE:
            before = Pieces(self._incarnation, source, work.remote, work.lengths)
            after = Pieces(self._incarnation, to, work.remote, work.lengths)
            before.advance(work.total_bytes)
        for destination, origin, length in zip(to.tolist(), source.tolist(), work.lengths.tolist(), strict=True):
            self._copy_range(destination, origin, length, work.deadline, gate)
        if before is not None and after is not None:
            after.advance(work.total_bytes)
            damaged = after.mismatches(before.to_bytes())
            if damaged:
                raise IntegrityError(f"{len(damaged)} ranges changed while they were copied", damaged)

    def _copy_range(self, to: int, source: int, length: int, deadline: Deadline, gate: WriteAdmission | None) -> None:
        for start in range(0, length, CHUNK_BYTES):
            if self._is_interrupted:
                raise PeerClosedError("the transfer was interrupted on this side")
            if deadline.has_passed:
                raise DeadlineExceededError("the transfer's deadline passed")
            if gate is not None and not gate.begin_chunk():
                raise GrantError("the grant was revoked or has expired")
            try:
                ctypes.memmove(to + start, source + start, min(CHUNK_BYTES, length - start))
            finally:
                if gate is not None:
                    gate.end_chunk()

    def interrupt(self) -> None:
        """Stop before the next chunk."""
        self._is_interrupted = True

    def close(self) -> None:
        """Nothing to give back."""
        self._is_interrupted = True


class LoopbackTransport(Transport):
    """Copies inside one process."""

    name: ClassVar[str] = "loopback"
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.READ, Capability.WRITE, Capability.FENCES_WRITES, Capability.INTEGRITY}
    )

    def listen(self, host: TransportHost) -> Listener:
        """Make this engine reachable inside the process."""
        return LoopbackListener(host)

    def reach(self, host: TransportHost, peer: SegmentDescription) -> Reach:
        """An engine is in this process when its incarnation is registered here: proof, not a guess."""
        with _hosts_lock:
            is_here = peer.incarnation in _hosts
        if not is_here or self.name not in peer.transports:
            return Reach(False, "the peer is not in this process")
        return Reach(True, "same process", cost=0)

    def connect(self, host: TransportHost, peer: SegmentDescription, deadline: Deadline) -> Endpoint:
        """Find the other engine."""
        _find(peer.incarnation)
        me = host.description
        return LoopbackEndpoint(Identity(me.segment, me.incarnation, me.address), peer.incarnation)
