"""What every metadata backend must do. Inherit, set ``metadata``, and pytest does the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from mooncake_plugins.errors import DeadlineExceededError, MetadataError, PeerClosedError
from mooncake_plugins.transfer import EngineOptions, TransferEngine

if TYPE_CHECKING:
    from mooncake_plugins.plugins import PluginRegistry


class MetadataTests:
    """Conformance of a metadata backend.

    Attributes:
        metadata: The setting, as in `EngineOptions.metadata`.
    """

    metadata: ClassVar[str]

    def registry(self) -> PluginRegistry | None:
        """The registry that offers the backend; None: the installed plugins."""
        return None

    def name_of(self, engine: TransferEngine) -> str:
        """What others call this engine's segment."""
        return engine.address

    def unknown_name(self) -> str:
        """A name that nobody published."""
        return "127.0.0.1:1"

    def make(self, segment: str = "") -> TransferEngine:
        """An engine that uses the backend."""
        return TransferEngine(EngineOptions(metadata=self.metadata, segment=segment), registry=self.registry())

    @pytest.fixture
    def engine(self, leak_check: None) -> Iterator[TransferEngine]:
        """The engine that asks."""
        with self.make() as engine:
            yield engine

    def test_describes_a_peer(self, engine: TransferEngine) -> None:
        with self.make("other") as other:
            other.register(np.zeros(100, np.uint8), name="pool")
            peer = engine.open(self.name_of(other), timeout_s=10)
            assert (peer.segment, peer.incarnation, peer.address) == ("other", other.incarnation, other.address)
            assert [(region.name, region.length) for region in peer.regions] == [("pool", 100)]

    def test_sees_later_registrations_on_reopening(self, engine: TransferEngine) -> None:
        with self.make() as other:
            assert engine.open(self.name_of(other), timeout_s=10).regions == ()
            region = other.register(np.zeros(10, np.uint8))
            assert len(engine.open(self.name_of(other), timeout_s=10).regions) == 1
            other.unregister(region, 5)
            assert engine.open(self.name_of(other), timeout_s=10).regions == ()

    def test_unknown_name_is_an_error(self, engine: TransferEngine) -> None:
        with pytest.raises((MetadataError, PeerClosedError)):
            engine.open(self.unknown_name(), timeout_s=5)

    def test_closed_engine_is_not_found(self, engine: TransferEngine) -> None:
        with self.make() as other:
            name = self.name_of(other)
        with pytest.raises((MetadataError, PeerClosedError)):
            engine.open(name, timeout_s=5)

    def test_deadline_holds(self, engine: TransferEngine) -> None:
        with self.make() as other, pytest.raises(DeadlineExceededError):
            engine.open(self.name_of(other), timeout_s=0)
