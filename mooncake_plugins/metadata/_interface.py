"""What a metadata backend implements, and what the engine gives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from mooncake_plugins.transports import SegmentDescription
from mooncake_plugins.wire import Agreed, Deadline, Stream


class MetadataHost(ABC):
    """What the engine gives its metadata backend."""

    @property
    @abstractmethod
    def description(self) -> SegmentDescription:
        """This engine's segment as it is now."""

    @abstractmethod
    def add_role(self, role: str, handler: Callable[[Stream, Agreed], None]) -> None:
        """Serve authenticated connections of this role on the engine's port."""

    @abstractmethod
    def remove_role(self, role: str) -> None:
        """Serve them no more."""

    @abstractmethod
    def dial_address(self, address: str, role: str, deadline: Deadline) -> tuple[Stream, Agreed]:
        """Open an authenticated connection to whatever engine listens at host:port."""


class MetadataBackend(ABC):
    """Publishes this engine's segment and resolves the names of others.

    One object per engine, made with ``(host, location)``: ``location`` is what follows the backend's name in
    `EngineOptions.metadata` (``"etcd://a:2379"``: ``"a:2379"``), empty for p2p. An entry names an incarnation, so
    that a peer which was restarted is never taken for its predecessor. Backends that store entries lease them and
    withdraw them on ``close``.
    """

    name: ClassVar[str]

    def __init__(self, host: MetadataHost, location: str) -> None:
        self.host = host
        self.location = location

    @abstractmethod
    def publish(self) -> None:
        """Make ``host.description`` findable; called again whenever it has changed.

        Raises:
            MetadataError: The service does not take it.
        """

    @abstractmethod
    def resolve(self, name: str, deadline: Deadline) -> SegmentDescription:
        """Return the segment of this name.

        Raises:
            MetadataError: Nobody published the name.
            PeerClosedError: Who should know does not answer.
            HandshakeError: Who should know refuses this side.
            DeadlineExceededError: No answer in time.
        """

    @abstractmethod
    def close(self) -> None:
        """Withdraw what was published. Idempotent."""
