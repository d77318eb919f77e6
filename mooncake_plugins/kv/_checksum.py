"""End-to-end checksums of KV blocks.

A block's checksum is XXH3-64 over its bytes, seeded with the block's identity: transfer, layer and position in the
sequence. The seed makes right bytes in the wrong place as visible as wrong bytes. This guards against faults, not
against forgers: who may speak at all is settled by the handshake.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

UInt64Array = npt.NDArray[np.uint64]
UInt8Array = npt.NDArray[np.uint8]

# Odd 64-bit constants (the golden ratio and a prime of the xxHash family) that spread layer and block over the seed.
_LAYER_STEP = np.uint64(0x9E3779B97F4A7C15)
_BLOCK_STEP = np.uint64(0xC2B2AE3D27D4EB4F)


def span_seeds(transfer_id: str, layer0: int, layer1: int, block0: int, block1: int) -> UInt64Array:
    """Return uint64[(layer1 - layer0) * (block1 - block0)], a seed a block, in the order of ``CacheLayout.offsets``."""
    root = np.uint64(xxhash.xxh3_64_intdigest(transfer_id.encode()))
    layers = np.arange(layer0, layer1, dtype=np.uint64) * _LAYER_STEP
    blocks = np.arange(block0, block1, dtype=np.uint64) * _BLOCK_STEP
    return (root + layers[:, None] + blocks[None, :]).reshape(-1)


def block_checksums(
    memory: UInt8Array, offsets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], seeds: UInt64Array
) -> UInt64Array:
    """Hash ranges of a memory.

    Args:
        memory: uint8[size], C order; read only here.
        offsets: int64[n], byte offsets in ``memory``.
        lengths: int64[n], bytes.
        seeds: uint64[n], see ``span_seeds``.

    Returns:
        uint64[n].

    Blocking: reads all ranges once (about 10 GB/s from RAM). xxhash releases the GIL for large ranges. Thread-safe.
    """
    view = memory.data
    digest = xxhash.xxh3_64_intdigest
    rows = zip(offsets.tolist(), (offsets + lengths).tolist(), seeds.tolist(), strict=True)
    return np.fromiter((digest(view[start:end], seed) for start, end, seed in rows), np.uint64, count=len(offsets))
