"""tcp with a speed limit: each work is cut into pieces, and before a piece goes, it waits for its turn."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np

from mooncake_plugins.config import from_sources
from mooncake_plugins.errors import ConfigError, DeadlineExceededError, IntegrityError, PeerClosedError
from mooncake_plugins.transports import (
    Admission,
    Capability,
    Endpoint,
    Listener,
    Offsets,
    Reach,
    SegmentDescription,
    Transport,
    TransportHost,
    Work,
    WriteAdmission,
)
from mooncake_plugins.transports.tcp import TcpTransport
from mooncake_plugins.wire import Agreed, Deadline, PeerIdentity, Stream

NAME = "throttle"
PIECES_PER_SECOND = 50
DEARER_THAN_ALL = 1000  # so that it is used only where it is asked for


@dataclasses.dataclass(frozen=True, slots=True)
class ThrottleOptions:
    """Settings, from ``MOONCAKE_THROTTLE_…``."""

    per_second_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if self.per_second_bytes < 1:
            raise ConfigError("per_second_bytes", self.per_second_bytes, "use 1 or more")


class OwnRoles(TransportHost):
    """The engine as tcp sees it, with another name for its connections: so plain tcp can be used beside this."""

    def __init__(self, host: TransportHost) -> None:
        self._host = host

    @property
    def description(self) -> SegmentDescription:
        return self._host.description

    def admit_read(self, peer: PeerIdentity, offsets: Offsets, lengths: Offsets) -> Admission:
        return self._host.admit_read(peer, offsets, lengths)

    def admit_write(self, peer: PeerIdentity, token: bytes, offsets: Offsets, lengths: Offsets) -> WriteAdmission:
        return self._host.admit_write(peer, token, offsets, lengths)

    def add_role(self, role: str, handler: Callable[[Stream, Agreed], None]) -> None:
        self._host.add_role(f"{NAME}-{role}", handler)

    def remove_role(self, role: str) -> None:
        self._host.remove_role(f"{NAME}-{role}")

    def dial(self, peer: SegmentDescription, role: str, deadline: Deadline) -> tuple[Stream, Agreed]:
        return self._host.dial(peer, f"{NAME}-{role}", deadline)

    def count(self, name: str, amount: int = 1) -> None:
        self._host.count(name, amount)


class ThrottleEndpoint(Endpoint):
    """A tcp connection that waits between pieces. One thread owns it, so it needs no lock."""

    def __init__(self, inner: Endpoint, host: TransportHost, per_second_bytes: int) -> None:
        self._inner, self._host, self._per_second_bytes = inner, host, per_second_bytes
        self._interrupted = threading.Event()
        self._free_at = time.monotonic()

    def execute(self, work: Work) -> None:
        """Move the work piece by piece. Between pieces nothing of it is touched, so it may stop there at once."""
        for first, piece in pieces(work, max(1, self._per_second_bytes // PIECES_PER_SECOND)):
            self._wait_for_my_turn(piece)
            try:
                self._inner.execute(piece)
            except IntegrityError as error:  # it counts ranges from the beginning of the piece
                raise IntegrityError(str(error), tuple(first + index for index in error.indexes)) from error
            self._host.count("throttle_pieces")

    def _wait_for_my_turn(self, piece: Work) -> None:
        now = time.monotonic()
        turn = max(now, self._free_at)
        if turn > piece.deadline.at:
            raise DeadlineExceededError(f"the limit of {self._per_second_bytes} bytes a second leaves no time for this")
        if self._interrupted.wait(turn - now):
            raise PeerClosedError("the transfer was interrupted on this side")
        self._free_at = turn + piece.total_bytes / self._per_second_bytes

    def interrupt(self) -> None:
        """Wake the waiting and break the connection."""
        self._interrupted.set()
        self._inner.interrupt()

    @property
    def is_usable(self) -> bool:
        """As the connection below."""
        return self._inner.is_usable and not self._interrupted.is_set()

    def close(self) -> None:
        """Close the connection below."""
        self._inner.close()


def pieces(work: Work, about_bytes: int) -> Iterator[tuple[int, Work]]:
    """Cut a work between its ranges into pieces of about this size, with the index of the first range of each."""
    number = (np.cumsum(work.lengths) - 1) // about_bytes
    starts = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(number)], strict=True):
        part = slice(start, end)
        yield (
            start,
            dataclasses.replace(
                work,
                local=work.local[part],
                addresses=work.addresses[part],
                remote=work.remote[part],
                lengths=work.lengths[part],
                total_bytes=int(work.lengths[part].sum()),
            ),
        )


class ThrottleTransport(Transport):
    """tcp with a speed limit."""

    name: ClassVar[str] = NAME
    capabilities: ClassVar[frozenset[Capability]] = TcpTransport.capabilities

    def __init__(self) -> None:
        self._tcp = TcpTransport()
        self._options = from_sources(ThrottleOptions, NAME, environ=os.environ)

    def listen(self, host: TransportHost) -> Listener:
        """Serve peers on the engine's port, under our own roles."""
        return self._tcp.listen(OwnRoles(host))

    def reach(self, host: TransportHost, peer: SegmentDescription) -> Reach:
        """Any peer that listens in this way can be reached."""
        if self.name not in peer.transports:
            return Reach(False, f"the peer does not listen on {NAME}")
        return Reach(True, f"network with a speed limit, to {peer.address}", cost=DEARER_THAN_ALL)

    def connect(self, host: TransportHost, peer: SegmentDescription, deadline: Deadline) -> Endpoint:
        """Open one connection."""
        own = OwnRoles(host)
        return ThrottleEndpoint(self._tcp.connect(own, peer, deadline), own, self._options.per_second_bytes)
