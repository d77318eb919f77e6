"""Settings of the hand-off, with their defaults and units."""

from __future__ import annotations

from dataclasses import dataclass

from mooncake_plugins.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffOptions:
    """Settings of the hand-off in one engine.

    Attributes:
        transports: Names of the transports to use, in order of preference; empty: all that this host offers, by
            topology.
        listen_host: Address that workers listen on; empty means loopback without a cluster secret, else the engine's
            own host address.
        listen_port: Port of rank 0 (further ranks take the following ones); 0 lets the system choose.
        verify: Compare checksums of what was pulled. Off believes every byte: for measurements only.
        watch_timeout_s: How long decode waits for the prefill to begin.
        transfer_timeout_s: How long a pull may take after the prefill has begun, the rest of the prefill included.
        peer_timeout_s: Silence after which the other side is taken for dead.
        lease_s: How long prefill holds finished blocks for decode.
        readers: Threads of a decode worker that move bytes.
        read_bytes: Bytes read, and hashed while warm, in one go.
    """

    transports: tuple[str, ...] = ()
    listen_host: str = ""
    listen_port: int = 0
    verify: bool = True
    watch_timeout_s: float = 120.0
    transfer_timeout_s: float = 120.0
    peer_timeout_s: float = 10.0
    lease_s: float = 60.0
    readers: int = 2
    # A third less CPU a byte than with 4 MiB; still larger reads gain little (benchmarks/handoff).
    read_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for name in ("watch_timeout_s", "transfer_timeout_s", "peer_timeout_s", "lease_s"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < 86400:
                raise ConfigError(name, value, "give seconds between 0 and 86400")
        if not isinstance(self.readers, int) or not 1 <= self.readers <= 64:
            raise ConfigError("readers", self.readers, "give 1 to 64 threads")
        if not isinstance(self.read_bytes, int) or self.read_bytes < 4096:
            raise ConfigError("read_bytes", self.read_bytes, "give 4 KiB or more")
        if not isinstance(self.verify, bool):
            raise ConfigError("verify", self.verify, "give true or false")
        if not isinstance(self.listen_host, str):
            raise ConfigError("listen_host", self.listen_host, "give an address of this host")
        if not isinstance(self.listen_port, int) or not 0 <= self.listen_port < 65536:
            raise ConfigError("listen_port", self.listen_port, "give a port number, or 0")
