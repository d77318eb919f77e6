"""p2p: a segment's name is its engine's host:port, and the engine itself answers (role "metadata")."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from mooncake_plugins.errors import DeadlineExceededError, FrameError, MetadataError
from mooncake_plugins.transports import SegmentDescription
from mooncake_plugins.wire import Agreed, Channel, Deadline, Stream

from ._interface import MetadataBackend, MetadataHost

__all__ = ["P2pMetadata"]

ROLE = "metadata"
QUESTION_TIMEOUT_S = 10.0


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """Asks an engine for its segment."""


class P2pMetadata(MetadataBackend):
    """Asks the peer."""

    name: ClassVar[str] = "p2p"

    def __init__(self, host: MetadataHost, location: str) -> None:
        super().__init__(host, location)
        if location:
            raise MetadataError(f"p2p metadata has no server; remove {location!r}")
        host.add_role(ROLE, self._serve)

    def publish(self) -> None:
        """Nothing to store: questions are answered with what holds at that moment."""

    def _serve(self, stream: Stream, agreed: Agreed) -> None:
        channel = Channel(stream, agreed, Describe)
        while True:
            try:
                channel.recv(timeout_s=QUESTION_TIMEOUT_S)
            except DeadlineExceededError:
                return
            channel.send(self.host.description, timeout_s=QUESTION_TIMEOUT_S)

    def resolve(self, name: str, deadline: Deadline) -> SegmentDescription:
        """Ask the engine at ``name`` (host:port)."""
        stream, agreed = self.host.dial_address(name, ROLE, deadline)
        with Channel(stream, agreed, SegmentDescription) as channel:
            channel.send(Describe(), timeout_s=deadline.remaining_s)
            found: SegmentDescription = channel.recv(timeout_s=deadline.remaining_s)
        if found.incarnation != agreed.peer.incarnation:
            raise FrameError(f"the engine at {name} describes another one")
        return found

    def close(self) -> None:
        """Answer no more."""
        self.host.remove_role(ROLE)
