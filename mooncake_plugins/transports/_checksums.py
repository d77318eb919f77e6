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
        sizes = np.minimum(lengths[self.owner] - within, CHUNK_BYTES)
        self._ends = np.cumsum(sizes)
        base = np.uint64(xxhash.xxh3_64_intdigest(incarnation.encode()))
        places = (offsets[self.owner] + within).astype(np.uint64)
        seeds = base ^ (places * _OFFSET_FACTOR) ^ (sizes.astype(np.uint64) * _LENGTH_FACTOR)
        # As lists, because the loop below takes them one by one.
        self._todo = list(zip((addresses[self.owner] + within).tolist(), sizes.tolist(), seeds.tolist(), strict=True))
        self._digests: list[int] = []

    def advance(self, done: int) -> None:
        """Hash every piece that ends within the first ``done`` bytes and is not hashed yet."""
        stop = int(np.searchsorted(self._ends, done, "right"))
        for address, size, seed in self._todo[len(self._digests) : stop]:
            memory = (ctypes.c_char * size).from_address(address)
            self._digests.append(xxhash.xxh3_64_intdigest(memory, seed))

    def mismatches(self, theirs: bytes) -> tuple[int, ...]:
        """Return the ranges of which a digest differs from the peer's (little-endian uint64 each)."""
        other = np.frombuffer(theirs, "<u8")
        mine = np.array(self._digests, np.uint64)
        return tuple(int(i) for i in np.unique(self.owner[other != mine]))

    def to_bytes(self) -> bytes:
        """The digests as they go over the wire."""
        return np.array(self._digests, "<u8").tobytes()
