"""Checksums of a transfer: one xxh3_64 per piece, made chunk by chunk while the bytes are warm.

A piece is a range of the work, cut every ``CHUNK_BYTES``. Its seed is made of its identity (whose segment, which
offset, how long), so right bytes in the wrong place do not pass.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import xxhash

from ._types import CHUNK_BYTES

Array = npt.NDArray[np.int64]

_OFFSET_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_LENGTH_FACTOR = np.uint64(0xC2B2AE3D27D4EB4F)


def piece_count(lengths: Array) -> int:
    """How many checksums the ranges have."""
    return int(((lengths + (CHUNK_BYTES - 1)) // CHUNK_BYTES).sum())


class Pieces:
    """The pieces of a list of ranges, hashed in order as the bytes pass.

    Args:
        incarnation: Of the engine whose segment the offsets are in.
        addresses: int64[n], where the ranges lie in this process.
        offsets: int64[n], where they lie in the segment of the side that did not ask (the target's).
        lengths: int64[n], bytes.
    """

    def __init__(self, incarnation: str, addresses: Array, offsets: Array, lengths: Array) -> None:
        counts = (lengths + (CHUNK_BYTES - 1)) // CHUNK_BYTES
        self.owner = np.repeat(np.arange(len(lengths)), counts)
        firsts = np.cumsum(counts) - counts
        within = (np.arange(len(self.owner)) - firsts[self.owner]) * CHUNK_BYTES
        self._lengths = np.minimum(lengths[self.owner] - within, CHUNK_BYTES)
        self._addresses = addresses[self.owner] + within
        self._ends = np.cumsum(self._lengths)
        base = np.uint64(xxhash.xxh3_64_intdigest(incarnation.encode()))
        places = (offsets[self.owner] + within).astype(np.uint64)
        self._seeds = base ^ (places * _OFFSET_FACTOR) ^ (self._lengths.astype(np.uint64) * _LENGTH_FACTOR)
        self.digests = np.zeros(len(self.owner), np.uint64)
        self._next = 0

    def advance(self, done: int) -> None:
        """Hash every piece that ends within the first ``done`` bytes and is not hashed yet."""
        stop = int(np.searchsorted(self._ends, done, "right"))
        for i in range(self._next, stop):
            memory = (ctypes.c_char * int(self._lengths[i])).from_address(int(self._addresses[i]))
            self.digests[i] = xxhash.xxh3_64_intdigest(memory, int(self._seeds[i]))
        self._next = max(self._next, stop)

    def mismatches(self, theirs: bytes) -> tuple[int, ...]:
        """Return the ranges of which a digest differs from the peer's (little-endian uint64 each)."""
        other = np.frombuffer(theirs, "<u8")
        return tuple(int(i) for i in np.unique(self.owner[other != self.digests]))

    def to_bytes(self) -> bytes:
        """The digests as they go over the wire."""
        return self.digests.astype("<u8").tobytes()
