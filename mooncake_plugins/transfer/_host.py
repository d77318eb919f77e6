"""What an engine gives its transports and its metadata backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mooncake_plugins.errors import GrantError, OutOfBoundsError, RejectedError
from mooncake_plugins.metadata import MetadataHost
from mooncake_plugins.transports import (
    Addresses,
    Admission,
    Offsets,
    RegionDescription,
    Rights,
    SegmentDescription,
    TransportHost,
    WriteAdmission,
)
from mooncake_plugins.wire import Agreed, Deadline, Identity, KeyHolder, PeerIdentity, RoleListener, Stream, dial

from ._grants import GrantedWrite, GrantTable
from ._regions import Pin, RegionTable

if TYPE_CHECKING:
    from ._counters import Counters


class _Admitted(Admission):
    def __init__(self, pin: Pin) -> None:
        self._pin = pin

    @property
    def addresses(self) -> Addresses:
        return self._pin.addresses

    def release(self) -> None:
        self._pin.release()


class EngineHost(TransportHost, MetadataHost):
    """Admits peers to this engine's memory and opens connections in its name."""

    def __init__(
        self,
        identity: Identity,
        secret: KeyHolder | None,
        listener: RoleListener,
        regions: RegionTable,
        grants: GrantTable,
        counters: Counters,
    ) -> None:
        self.identity = identity
        self._secret = secret
        self._listener, self._regions, self._grants, self._counters = listener, regions, grants, counters
        self.transports: dict[str, dict[str, str]] = {}

    @property
    def description(self) -> SegmentDescription:
        """This engine's segment as it is now."""
        regions = tuple(
            RegionDescription(r.name, r.offset, r.length, r.rights.value, "memory", handles)
            for r, _, handles in self._regions.entries()
        )
        me = self.identity
        return SegmentDescription(me.segment, me.incarnation, me.address, self.transports, regions)

    def admit_read(self, peer: PeerIdentity, offsets: Offsets, lengths: Offsets) -> Admission:
        """See `TransportHost.admit_read`."""
        try:
            return _Admitted(self._regions.pin("remote", offsets, lengths, Rights.READ))
        except OutOfBoundsError as error:
            raise RejectedError(str(error)) from error

    def admit_write(self, peer: PeerIdentity, token: bytes, offsets: Offsets, lengths: Offsets) -> WriteAdmission:
        """See `TransportHost.admit_write`."""
        grant = self._grants.find(token)
        grant.check(peer, offsets, lengths)
        try:
            return GrantedWrite(grant, self._regions.pin("remote", offsets, lengths, Rights.WRITE, writes=True))
        except OutOfBoundsError as error:
            raise GrantError(str(error)) from error

    def add_role(self, role: str, handler: Callable[[Stream, Agreed], None]) -> None:
        """Serve authenticated connections of a role."""
        self._listener.add_role(role, handler)

    def remove_role(self, role: str) -> None:
        """Serve them no more."""
        self._listener.remove_role(role)

    def dial(self, peer: SegmentDescription, role: str, deadline: Deadline) -> tuple[Stream, Agreed]:
        """Connect to this incarnation of a peer."""
        return dial(peer.address, role, self.identity, self._secret, deadline, incarnation=peer.incarnation)

    def dial_address(self, address: str, role: str, deadline: Deadline) -> tuple[Stream, Agreed]:
        """Connect to whoever listens at an address."""
        return dial(address, role, self.identity, self._secret, deadline)

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        self._counters.add(name, amount)
