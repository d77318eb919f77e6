"""An opened peer, and the choice of the way to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mooncake_plugins.errors import PeerClosedError
from mooncake_plugins.transports import RegionDescription, SegmentDescription, Transport, TransportHost

from ._link import Link

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TransferPath:
    """Which transport is used with a peer, why, and why not the others."""

    transport: str
    reason: str
    others: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.transport} ({self.reason})"


class Peer:
    """A peer's segment as it was when opened. Stays valid for this incarnation of the peer only."""

    def __init__(
        self, description: SegmentDescription, path: TransferPath, link: Link, on_close: Callable[[Peer], None]
    ) -> None:
        self._description = description
        self._path = path
        self._link = link
        self._on_close = on_close
        self.is_closed = False

    @property
    def segment(self) -> str:
        """The segment's name."""
        return self._description.segment

    @property
    def incarnation(self) -> str:
        """Which life of the peer this is."""
        return self._description.incarnation

    @property
    def address(self) -> str:
        """host:port of its engine."""
        return self._description.address

    @property
    def regions(self) -> tuple[RegionDescription, ...]:
        """The buffers that were registered there when it was opened."""
        return self._description.regions

    @property
    def path(self) -> TransferPath:
        """The transport in use, and the reason."""
        return self._path

    @property
    def link(self) -> Link:
        """For the engine: the traffic with this peer."""
        return self._link

    def close(self) -> None:
        """Give up this peer; batches under way fail when its last handle is closed. Idempotent."""
        if not self.is_closed:
            self.is_closed = True
            self._on_close(self)

    def __repr__(self) -> str:
        return f"Peer({self.segment!r} at {self.address}, {self._path})"


def choose_paths(
    transports: Mapping[str, Transport], host: TransportHost, peer: SegmentDescription
) -> list[TransferPath]:
    """Return the ways to a peer, cheapest first.

    Raises:
        PeerClosedError: No transport reaches it; says why each does not.
    """
    possible: list[tuple[int, str, str]] = []
    excluded: list[tuple[str, str]] = []
    for name, transport in transports.items():
        reach = transport.reach(host, peer)
        if reach.is_possible:
            possible.append((reach.cost, name, reach.reason))
        else:
            excluded.append((name, reach.reason))
    if not possible:
        why = "; ".join(f"{name}: {reason}" for name, reason in excluded) or "no transport is enabled"
        raise PeerClosedError(f"no way to {peer.segment} at {peer.address}: {why}")
    possible.sort()
    others = tuple((name, f"dearer: {reason}") for _, name, reason in possible) + tuple(excluded)
    return [
        TransferPath(name, reason, tuple(other for other in others if other[0] != name)) for _, name, reason in possible
    ]
