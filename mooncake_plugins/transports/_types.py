"""Values that engine, transports and metadata share."""

from __future__ import annotations

from enum import Enum, Flag, auto

import msgspec

# The most that is received into final memory between two checks of a grant, and the unit of checksums.
CHUNK_BYTES = 256 << 10


class Opcode(Enum):
    """READ moves remote bytes to local memory, WRITE local bytes to remote memory."""

    READ = "read"
    WRITE = "write"


class Rights(Flag):
    """What peers may do with a registered buffer. WRITE also needs a grant for each transfer."""

    NONE = 0
    READ = auto()
    WRITE = auto()


class Integrity(Enum):
    """Checksum over the bytes of a transfer."""

    NONE = "none"
    XXH3_64 = "xxh3_64"


class Capability(Enum):
    """What a transport can do; declared, never found out by trying."""

    READ = "read"  # moves remote bytes to local memory
    WRITE = "write"  # moves local bytes to granted remote memory
    REMOTE = "remote"  # reaches other hosts
    FENCES_WRITES = "fences-writes"  # a revoked grant is FENCED without any help of the writer
    INTEGRITY = "integrity"  # can carry and verify checksums


class RegionDescription(msgspec.Struct, frozen=True, array_like=True):
    """A registered buffer as peers see it.

    ``handles``: what each transport needs to reach it (an rkey, an IPC handle).
    """

    name: str
    offset: int
    length: int
    rights: int
    kind: str = "memory"
    handles: dict[str, bytes] = {}


class SegmentDescription(msgspec.Struct, frozen=True, array_like=True):
    """A segment as peers see it: what a metadata backend stores or answers.

    ``transports`` maps each transport that the engine listens on to what a peer needs to connect; ``host`` holds facts
    about the machine by which topology is decided.
    """

    segment: str
    incarnation: str
    address: str
    transports: dict[str, dict[str, str]] = {}
    regions: tuple[RegionDescription, ...] = ()
    host: dict[str, str] = {}
