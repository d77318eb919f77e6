"""The opened peers of one engine, and one link for each incarnation."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping

from mooncake_plugins.errors import ClosedError
from mooncake_plugins.transports import Endpoint, SegmentDescription, Transport, TransportHost
from mooncake_plugins.wire import Deadline

from ._link import Link
from ._options import EngineOptions
from ._peer import Peer, TransferPath, choose_paths

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0


class PeerTable:
    """Handles of the same incarnation share a link; a link without handles goes once it is idle. Thread-safe."""

    def __init__(
        self,
        transports: Mapping[str, Transport],
        host: TransportHost,
        options: EngineOptions,
        count: Callable[[str, int], None],
    ) -> None:
        self._transports, self._host, self._options, self._count = transports, host, options, count
        self._lock = threading.Lock()
        self._links: dict[str, tuple[Link, TransferPath]] = {}
        self._peers: weakref.WeakSet[Peer] = weakref.WeakSet()
        self._said: set[tuple[str, str]] = set()
        self._is_closed = False

    def open(self, description: SegmentDescription) -> Peer:
        """Return a handle.

        Raises:
            PeerClosedError: No transport reaches the peer.
            ClosedError: The engine is closed.
        """
        with self._lock:
            if self._is_closed:
                raise ClosedError("the engine is closed")
            known = self._links.get(description.incarnation)
            link, path = known if known is not None else self._make_link(description)
            peer = Peer(description, path, link, self._close_peer)
            self._peers.add(peer)
        return peer

    def _make_link(self, description: SegmentDescription) -> tuple[Link, TransferPath]:
        path = choose_paths(self._transports, self._host, description)[0]
        link = Link(
            description.segment,
            self._connector(self._transports[path.transport], description),
            self._options.connections_per_peer,
            self._options.idle_timeout_s,
            self._options.connect_timeout_s,
            self._count,
        )
        self._links[description.incarnation] = (link, path)
        self._say_path(description, path)
        return link, path

    def _connector(self, transport: Transport, peer: SegmentDescription) -> Callable[[Deadline], Endpoint]:
        return lambda deadline: transport.connect(self._host, peer, deadline)

    def _say_path(self, description: SegmentDescription, path: TransferPath) -> None:
        said = (description.address, path.transport)
        level = logging.DEBUG if said in self._said else logging.INFO
        self._said.add(said)
        log.log(level, "path peer=%s address=%s transport=%s reason=%s", description.segment, *said, path.reason)

    def _close_peer(self, peer: Peer) -> None:
        with self._lock:
            self._peers.discard(peer)
            if any(other.incarnation == peer.incarnation for other in self._peers):
                return
            self._links.pop(peer.incarnation, None)
        peer.link.close(Deadline(CLOSE_TIMEOUT_S))

    def sweep(self) -> None:
        """Close what dead and forgotten peers left behind."""
        with self._lock:
            held = {peer.incarnation for peer in self._peers}
            dropped = [key for key, (link, _) in self._links.items() if key not in held and link.is_idle]
            forgotten = [self._links.pop(key)[0] for key in dropped]
            links = [link for link, _ in self._links.values()]
        for link in forgotten:
            link.close(Deadline(CLOSE_TIMEOUT_S))
        for link in links:
            link.sweep()

    def links(self) -> list[Link]:
        """The links that exist."""
        with self._lock:
            return [link for link, _ in self._links.values()]

    def close(self, deadline: Deadline) -> None:
        """Close every link; no handle is given any more. Idempotent."""
        with self._lock:
            self._is_closed = True
            links = [link for link, _ in self._links.values()]
            self._links.clear()
        for link in links:
            link.close(deadline)
