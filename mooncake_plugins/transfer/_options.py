"""Settings of an engine, with units and defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mooncake_plugins.errors import ConfigError
from mooncake_plugins.transports import Integrity
from mooncake_plugins.wire import KeyHolder, parse_address, parse_listen

_POSITIVE = (
    "connections_per_peer",
    "slice_bytes",
    "handshake_timeout_s",
    "idle_timeout_s",
    "max_connections",
    "max_pending_handshakes",
    "max_grants",
    "connect_timeout_s",
)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is set up.

    Args:
        listen: Address of the one port, ``tcp://host:port``; port 0 lets the system choose.
        advertise: host:port that peers use; needed when ``listen`` is a wildcard address.
        segment: Name of this engine's segment; empty: its address.
        secret: The cluster secret (`mooncake_plugins.config.Secret`); without one only loopback addresses may be used.
        transports: Names of the transports to use; None: all that are offered and can be loaded.
        metadata: Metadata backend, ``name`` or ``name://location``.
        connections_per_peer: Most connections, and mover threads, for transfers with one peer.
        slice_bytes: Largest piece of a batch that goes to one connection at a time.
        integrity: Checksums for batches that do not say otherwise.
        handshake_timeout_s: How long a stranger may take to prove itself.
        connect_timeout_s: How long connecting to a peer may take.
        idle_timeout_s: After this time without work a mover thread ends and idle connections are closed.
        max_connections: Most accepted connections.
        max_pending_handshakes: Most accepted connections that have not proved themselves.
        max_grants: Most open grants.
        quarantine_limit_bytes: Most bytes of revoked grants that are not fenced; beyond it new grants are refused.
    """

    listen: str = "tcp://127.0.0.1:0"
    advertise: str | None = None
    segment: str = ""
    secret: KeyHolder | None = None
    transports: tuple[str, ...] | None = None
    metadata: str = "p2p"
    connections_per_peer: int = 2
    slice_bytes: int = 16 << 20
    integrity: Integrity = Integrity.NONE
    handshake_timeout_s: float = 5.0
    connect_timeout_s: float = 5.0
    idle_timeout_s: float = 30.0
    max_connections: int = 1024
    max_pending_handshakes: int = 64
    max_grants: int = 65536
    quarantine_limit_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        listen = parse_listen(self.listen)
        if self.advertise is not None:
            parse_address(self.advertise, "advertise")
        elif listen.is_wildcard:
            raise ConfigError(
                "advertise", None, f"peers cannot connect to {listen.host!r}; give the address they can use"
            )
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "it must be greater than 0")
        if self.quarantine_limit_bytes < 0:
            raise ConfigError("quarantine_limit_bytes", self.quarantine_limit_bytes, "it must not be negative")
        if len(self.segment) > 200:
            raise ConfigError("segment", self.segment, "a name has at most 200 characters")

    def __repr__(self) -> str:
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "secret")
        return f"EngineOptions({', '.join(shown)}, secret={'set' if self.secret else None})"
