"""tcp: between any two hosts, over the engine's own port.

Connections have the role "transfer". Bytes go straight between socket and registered memory on both sides, many
ranges per system call. Fencing: a READ is received by the initiator's own thread, which has stopped when ``execute``
returns; a WRITE is received by the target's thread, which asks for the grant before every chunk.
"""

from __future__ import annotations

from typing import ClassVar

from mooncake_plugins.wire import Agreed, Deadline, Stream

from ._interface import Endpoint, Listener, Reach, Transport, TransportHost
from ._tcp_endpoint import TcpEndpoint
from ._tcp_protocol import ROLE
from ._tcp_service import TcpService
from ._types import Capability, SegmentDescription

__all__ = ["TcpTransport"]


class TcpListener(Listener):
    """Serves connections of role "transfer"."""

    def __init__(self, host: TransportHost) -> None:
        self._host = host
        host.add_role(ROLE, self._serve)

    @property
    def description(self) -> dict[str, str]:
        """The engine's address is all that peers need."""
        return {}

    def _serve(self, stream: Stream, agreed: Agreed) -> None:
        TcpService(self._host, stream, agreed).serve()

    def close(self) -> None:
        """Accept no more; connections end with the engine's port."""
        self._host.remove_role(ROLE)


class TcpTransport(Transport):
    """Sockets, between any two hosts."""

    name: ClassVar[str] = "tcp"
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {
            Capability.READ,
            Capability.WRITE,
            Capability.REMOTE,
            Capability.FENCES_WRITES,
            Capability.INTEGRITY,
        }
    )

    def listen(self, host: TransportHost) -> Listener:
        """Serve peers on the engine's port."""
        return TcpListener(host)

    def reach(self, host: TransportHost, peer: SegmentDescription) -> Reach:
        """Any peer that listens on tcp can be reached."""
        if self.name not in peer.transports:
            return Reach(False, "the peer does not listen on tcp")
        return Reach(True, f"network, to {peer.address}", cost=100)

    def connect(self, host: TransportHost, peer: SegmentDescription, deadline: Deadline) -> Endpoint:
        """Open one connection."""
        stream, agreed = host.dial(peer, ROLE, deadline)
        try:
            return TcpEndpoint(stream, agreed.version, peer.incarnation)
        except BaseException:
            stream.close(reset=True)
            raise
