"""How bytes move between segments: the interface that transports implement, and the built-in ones."""

from __future__ import annotations

from ._interface import (
    Addresses,
    Admission,
    Endpoint,
    Listener,
    Offsets,
    Reach,
    Transport,
    TransportHost,
    Work,
    WriteAdmission,
)
from ._types import (
    CHUNK_BYTES,
    Capability,
    Integrity,
    Opcode,
    RegionDescription,
    Rights,
    SegmentDescription,
)

__all__ = [
    "CHUNK_BYTES",
    "Addresses",
    "Admission",
    "Capability",
    "Endpoint",
    "Integrity",
    "Listener",
    "Offsets",
    "Opcode",
    "Reach",
    "RegionDescription",
    "Rights",
    "SegmentDescription",
    "Transport",
    "TransportHost",
    "Work",
    "WriteAdmission",
]
