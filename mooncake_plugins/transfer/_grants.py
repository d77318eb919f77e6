"""Grants: the owner's permission to write, and how it is taken back for certain.

    OPEN --revoke | deadline--> CLOSED --no chunk is in progress and every transport says so--> FENCED

A writer's bytes land only between ``begin_chunk`` and ``end_chunk``, and ``begin_chunk`` says no once the grant is
not OPEN. So the grant is FENCED when it is CLOSED and no chunk is in progress: from then on no byte can land under
it, whatever the writer, the network or a sleeping thread does. Until then its bytes are in quarantine.
"""

from __future__ import annotations

import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from mooncake_plugins.errors import GrantError, LocalUsageError, QuarantineFullError
from mooncake_plugins.transports import Addresses, Listener, Offsets, WriteAdmission
from mooncake_plugins.wire import Deadline, PeerIdentity

from ._ranges import merge
from ._regions import Pin

TOKEN_BYTES = 32


class Fence(Enum):
    """What a revocation has reached."""

    FENCED = "fenced"  # no byte can land any more
    QUARANTINED = "quarantined"  # that is not sure yet: do not use the ranges


@dataclass(frozen=True, slots=True, eq=False)
class GrantedRanges:
    """Sorted, disjoint ranges of the segment."""

    starts: Offsets
    ends: Offsets

    @classmethod
    def of(cls, offsets: Offsets, lengths: Offsets) -> GrantedRanges:
        """Sort and join ranges.

        Raises:
            LocalUsageError: Two ranges overlap.
        """
        order = np.argsort(offsets, kind="stable")
        starts, sizes = offsets[order], lengths[order]
        if (starts[1:] < starts[:-1] + sizes[:-1]).any():
            raise LocalUsageError("two granted ranges overlap")
        runs = merge(starts, starts, sizes)
        return cls(runs.local, runs.local + runs.lengths)

    @property
    def total_bytes(self) -> int:
        """Bytes covered."""
        return int((self.ends - self.starts).sum())

    def first_outside(self, offsets: Offsets, lengths: Offsets) -> int | None:
        """Index of the first range that is not covered, or None."""
        index = np.searchsorted(self.starts, offsets, "right") - 1
        is_inside = (index >= 0) & (lengths <= self.ends[index] - offsets)
        return None if is_inside.all() else int(np.argmin(is_inside))

    def overlaps(self, start: int, end: int) -> bool:
        """True when a byte of [start, end) is covered."""
        return bool(((self.starts < end) & (self.ends > start)).any())


class Grant:
    """Permission for peers to write some ranges until a deadline. Made by `TransferEngine.grant`; thread-safe.

    ``token`` goes to the writer, over a channel of the caller's choice; who has it may write.
    """

    def __init__(
        self, table: GrantTable, epoch: int, ranges: GrantedRanges, deadline: Deadline, peer: str | None
    ) -> None:
        self.epoch = epoch
        self.token = struct.pack(">Q", epoch) + secrets.token_bytes(TOKEN_BYTES - 8)
        self.ranges = ranges
        self.total_bytes = ranges.total_bytes
        self.peer = peer
        self._table = table
        self._deadline = deadline
        self._changed = threading.Condition()
        self._is_revoked = False
        self._is_fenced = False
        self._chunks = 0

    @property
    def is_open(self) -> bool:
        """True while writes are taken."""
        return not self._is_revoked and time.monotonic() < self._deadline.at

    @property
    def is_fenced(self) -> bool:
        """True once a revocation is complete."""
        return self._is_fenced

    def revoke(self, timeout_s: float) -> Fence:
        """Take the permission back.

        Returns:
            FENCED: No byte can land under this grant any more: the ranges may be used again.
            QUARANTINED: That could not be made sure in time. The bytes are counted in ``quarantined_bytes`` until it
                is; call again to learn whether it is by now.

        Blocking: up to ``timeout_s``. Thread-safe, idempotent.
        """
        return self._table.revoke(self, Deadline(timeout_s))

    def begin_chunk(self) -> bool:
        """For receivers: may a chunk land? If so, ``end_chunk`` must follow at once."""
        with self._changed:
            if not self.is_open:
                return False
            self._chunks += 1
            return True

    def end_chunk(self) -> None:
        """For receivers: the chunk has landed."""
        with self._changed:
            self._chunks -= 1
            if not self._chunks:
                self._changed.notify_all()

    def close_gate(self) -> None:
        """No chunk begins from now on."""
        with self._changed:
            self._is_revoked = True

    def wait_quiet(self, deadline: Deadline) -> bool:
        """Wait until no chunk is in progress."""
        with self._changed:
            return self._changed.wait_for(lambda: self._chunks == 0, deadline.remaining_s)

    def mark_fenced(self) -> None:
        """Note that the revocation is complete."""
        self._is_fenced = True

    def check(self, peer: PeerIdentity, offsets: Offsets, lengths: Offsets) -> None:
        """Check a write before its first byte.

        Raises:
            GrantError: It is not covered.
        """
        if not self.is_open:
            raise GrantError("the grant was revoked or has expired")
        if self.peer is not None and peer.incarnation != self.peer:
            raise GrantError("the grant was given to another peer")
        bad = self.ranges.first_outside(offsets, lengths)
        if bad is not None:
            raise GrantError(f"range {bad} ({offsets[bad]}, {lengths[bad]} bytes) is not covered by the grant")


class GrantedWrite(WriteAdmission):
    """A write that was admitted under a grant."""

    def __init__(self, grant: Grant, pin: Pin) -> None:
        self._grant, self._pin = grant, pin

    @property
    def addresses(self) -> Addresses:
        """Where the ranges lie."""
        return self._pin.addresses

    def begin_chunk(self) -> bool:
        """Ask the grant."""
        return self._grant.begin_chunk()

    def end_chunk(self) -> None:
        """Tell the grant."""
        self._grant.end_chunk()

    def release(self) -> None:
        """Let the memory go."""
        self._pin.release()


class GrantTable:
    """The grants of one engine. Thread-safe."""

    def __init__(
        self,
        max_grants: int,
        quarantine_limit_bytes: int,
        listeners: Callable[[], Iterable[Listener]],
        count: Callable[[str], None],
    ) -> None:
        self._lock = threading.Lock()
        self._max_grants, self._limit = max_grants, quarantine_limit_bytes
        self._listeners, self._count = listeners, count
        self._grants: dict[bytes, Grant] = {}
        self._quarantine: dict[bytes, Grant] = {}
        self._epoch = 0

    def open(self, offsets: Offsets, lengths: Offsets, deadline: Deadline, peer: str | None) -> Grant:
        """Make a grant.

        Raises:
            QuarantineFullError: Too many bytes are in quarantine.
            LocalUsageError: Too many grants are open, or ranges overlap.
        """
        ranges = GrantedRanges.of(offsets, lengths)
        quarantined = self.settle()
        if quarantined and quarantined + ranges.total_bytes > self._limit:
            raise QuarantineFullError(f"{quarantined} bytes are in quarantine; the limit is {self._limit}")
        with self._lock:
            if len(self._grants) >= self._max_grants:
                self._drop_expired()
            if len(self._grants) >= self._max_grants:
                raise LocalUsageError(f"{self._max_grants} grants are open; revoke some")
            self._epoch += 1
            grant = Grant(self, self._epoch, ranges, deadline, peer)
            self._grants[grant.token] = grant
        self._count("grants_made")
        return grant

    def _drop_expired(self) -> None:
        for token, grant in list(self._grants.items()):
            if not grant.is_open:
                del self._grants[token]

    def find(self, token: bytes) -> Grant:
        """Return the grant of a token.

        Raises:
            GrantError: There is none.
        """
        with self._lock:
            grant = self._grants.get(token)
        if grant is None:
            raise GrantError("the grant is unknown, or was revoked")
        return grant

    def revoke(self, grant: Grant, deadline: Deadline) -> Fence:
        """See `Grant.revoke`."""
        with self._lock:
            self._grants.pop(grant.token, None)
        grant.close_gate()
        if grant.is_fenced:
            return Fence.FENCED
        if self._is_fenced(grant, deadline):
            grant.mark_fenced()
            with self._lock:
                self._quarantine.pop(grant.token, None)
            self._count("grants_fenced")
            return Fence.FENCED
        with self._lock:
            is_new = grant.token not in self._quarantine
            self._quarantine[grant.token] = grant
        if is_new:
            self._count("grants_quarantined")
        return Fence.QUARANTINED

    def _is_fenced(self, grant: Grant, deadline: Deadline) -> bool:
        if not grant.wait_quiet(deadline):
            return False
        return all(listener.fence(grant.token, deadline) for listener in self._listeners())

    def settle(self) -> int:
        """Release what has been fenced since; return the bytes that are still in quarantine."""
        with self._lock:
            waiting = list(self._quarantine.values())
        for grant in waiting:
            self.revoke(grant, Deadline(0))
        with self._lock:
            return sum(grant.total_bytes for grant in self._quarantine.values())

    @property
    def open_grants(self) -> int:
        """Grants that are open."""
        with self._lock:
            return sum(grant.is_open for grant in self._grants.values())

    def overlapping(self, start: int, end: int) -> list[Grant]:
        """Grants, open or in quarantine, that cover a byte of [start, end)."""
        with self._lock:
            grants = [*self._grants.values(), *self._quarantine.values()]
        return [grant for grant in grants if grant.ranges.overlaps(start, end)]

    def revoke_all(self, deadline: Deadline) -> None:
        """Revoke everything."""
        with self._lock:
            grants = list(self._grants.values())
        for grant in grants:
            self.revoke(grant, deadline)
