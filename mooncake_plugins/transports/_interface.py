"""What a transport implements, and what the engine gives it.

A transport has two faces. Facing its own engine it is told to *listen* and answers with a `Listener` (the target
side: peers come and touch memory of this segment). Facing peers it *connects* and answers with an `Endpoint` (the
initiator side).

The engine cuts batches into `Work`: a few thousand ranges at most, already checked against this side's registered
memory, merged, and pinned. One mover thread owns an endpoint and calls ``execute`` for one work after the other. The
contract that everything rests on:

    **When ``execute`` returns or raises, no local byte of the work is read or written any more.**

A transport that cannot stop at once must wait inside ``execute`` until it can promise that. ``interrupt``
makes ``execute`` raise soon; it comes from other threads.

On the target side no byte may be touched without an admission: `TransportHost.admit_read` and `admit_write` check
bounds and rights of all ranges at once, and pin the memory. A transport whose receiver is software on the target
writes chunk by chunk (at most ``CHUNK_BYTES``) between `WriteAdmission.begin_chunk` and ``end_chunk``: so a revoked
grant is fenced as soon as the chunk in progress ends. A transport whose writers bypass the target (shared memory,
RDMA) answers `Listener.fence` instead.

Addresses are process addresses in int64 arrays, so nothing here creates a Python object per range.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from mooncake_plugins.wire import Agreed, Deadline, PeerIdentity, Stream

from ._types import Capability, Integrity, Opcode, SegmentDescription

Offsets: TypeAlias = npt.NDArray[np.int64]
Addresses: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Reach:
    """Whether a transport can reach a peer. The engine takes the lowest cost; ``reason`` is shown to people.

    Costs of the built-ins: same process 0, same host 10 to 19, network with RDMA 50, network 100.
    """

    is_possible: bool
    reason: str
    cost: int = 100


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One piece of a batch, for one ``Endpoint.execute``.

    ``addresses[i]`` is where local range i lies in this process, ``local[i]`` its offset in this segment,
    ``remote[i]`` its offset in the peer's segment, ``lengths[i]`` > 0 its bytes; all ranges are inside registered
    memory of this side and stay valid during the call.
    """

    opcode: Opcode
    local: Offsets
    addresses: Addresses
    remote: Offsets
    lengths: Offsets
    total_bytes: int
    deadline: Deadline
    token: bytes = b""
    integrity: Integrity = Integrity.NONE


class Admission(ABC):
    """Permission to touch ranges of this segment on behalf of a peer; the memory stays registered until ``release``."""

    @property
    @abstractmethod
    def addresses(self) -> Addresses:
        """int64[n]: where each range lies in this process."""

    @abstractmethod
    def release(self) -> None:
        """Say that the ranges are not touched any more. Idempotent."""

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class WriteAdmission(Admission):
    """Permission to write under one grant."""

    def __enter__(self) -> WriteAdmission:
        return self

    @abstractmethod
    def begin_chunk(self) -> bool:
        """Return whether the grant still holds; if so, up to ``CHUNK_BYTES`` may land before ``end_chunk``."""

    @abstractmethod
    def end_chunk(self) -> None:
        """Say that the chunk has landed. Must follow each ``begin_chunk`` that returned True, soon."""


class TransportHost(ABC):
    """What the engine gives its transports."""

    @property
    @abstractmethod
    def description(self) -> SegmentDescription:
        """This engine's own segment."""

    @abstractmethod
    def admit_read(self, peer: PeerIdentity, offsets: Offsets, lengths: Offsets) -> Admission:
        """Let a peer read ranges of this segment.

        Raises:
            RejectedError: A range is out of bounds or not readable; names the first one.
        """

    @abstractmethod
    def admit_write(self, peer: PeerIdentity, token: bytes, offsets: Offsets, lengths: Offsets) -> WriteAdmission:
        """Let a peer write ranges of this segment.

        Raises:
            GrantError: The token is unknown, expired, revoked or another peer's, or does not cover a range.
        """

    @abstractmethod
    def add_role(self, role: str, handler: Callable[[Stream, Agreed], None]) -> None:
        """Serve authenticated connections of this role on the engine's port."""

    @abstractmethod
    def remove_role(self, role: str) -> None:
        """Serve them no more."""

    @abstractmethod
    def dial(self, peer: SegmentDescription, role: str, deadline: Deadline) -> tuple[Stream, Agreed]:
        """Open an authenticated connection to a peer's engine; only this very incarnation is accepted."""

    @abstractmethod
    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter that ``engine.metrics()`` shows."""


class Listener(ABC):
    """The target side of a transport in one engine."""

    @property
    @abstractmethod
    def description(self) -> dict[str, str]:
        """What peers need to connect; becomes ``SegmentDescription.transports[name]``."""

    def export(self, address: int, length: int, kind: str) -> bytes:
        """A buffer was registered: return what peers need to reach it (an rkey, an IPC handle); b"" for nothing."""
        return b""

    def withdraw(self, address: int, length: int) -> None:  # noqa: B027 - most transports have nothing to do
        """A buffer is being unregistered: after this returns, no peer can reach it through this transport."""

    def fence(self, token: bytes, deadline: Deadline) -> bool:
        """A grant was revoked: return True once no byte of a write under it can land, False if that is not sure in
        time.

        Transports that write under `WriteAdmission.begin_chunk` have nothing to add.
        """
        return True

    @abstractmethod
    def close(self) -> None:
        """Serve no more peers. Idempotent."""


class Endpoint(ABC):
    """A connection to one peer, owned by one mover thread."""

    @abstractmethod
    def execute(self, work: Work) -> None:
        """Move all bytes of the work, or raise. Afterwards no local byte of it is touched any more, in either case.

        Raises:
            RejectedError: The peer refused; no byte moved and the endpoint stays usable.
            DeadlineExceededError: The work's deadline passed.
            PeerClosedError: The connection broke or was interrupted.
            IntegrityError: Checksums differ; ``.ranges`` names the ranges of the work.
            FrameError: The peer speaks nonsense.
        """

    @abstractmethod
    def interrupt(self) -> None:
        """Make an ``execute`` in progress raise soon; the endpoint is unusable afterwards.

        From any thread, does not block.
        """

    @property
    @abstractmethod
    def is_usable(self) -> bool:
        """Whether the next ``execute`` has a chance.

        False after an error that broke the connection, or when the peer left.
        """

    @abstractmethod
    def close(self) -> None:
        """Give everything back; only from the owner, never during ``execute``. Idempotent."""


class Transport(ABC):
    """One way of moving bytes. One object serves any number of engines; it keeps no state of its own."""

    name: ClassVar[str]
    capabilities: ClassVar[frozenset[Capability]]

    @abstractmethod
    def listen(self, host: TransportHost) -> Listener:
        """Begin to serve peers of this engine."""

    @abstractmethod
    def reach(self, host: TransportHost, peer: SegmentDescription) -> Reach:
        """Say whether this peer can be reached this way, how dear that is, and why. Does not block."""

    @abstractmethod
    def connect(self, host: TransportHost, peer: SegmentDescription, deadline: Deadline) -> Endpoint:
        """Connect to a peer.

        Raises:
            PeerClosedError: It is gone, or another incarnation answers.
            DeadlineExceededError: No answer in time.
            HandshakeError: It refused.
        """
