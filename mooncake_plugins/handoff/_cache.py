"""A worker's KV cache as the hand-off sees it: registered memory, hashed and zeroed by block.

This is the seam for device memory: whoever keeps the cache elsewhere (CUDA) offers the same four things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mooncake_plugins.errors import ConfigError
from mooncake_plugins.kv import CacheLayout, block_checksums
from mooncake_plugins.transfer import Rights, TransferEngine

UInt8Array = npt.NDArray[np.uint8]
UInt64Array = npt.NDArray[np.uint64]
BlockIds = Sequence[int]


class BlockCache(Protocol):
    """What the hand-off needs of a KV cache."""

    @property
    def layout(self) -> CacheLayout:
        """Where its blocks lie in this process's segment."""
        ...

    def checksums(self, layer0: int, layer1: int, block_ids: BlockIds, seeds: UInt64Array) -> UInt64Array:
        """Hash a rectangle of blocks, layer by layer; uint64[(layer1 - layer0) * len(block_ids)]. Thread-safe."""
        ...

    def zero(self, block_ids: BlockIds) -> None:
        """Fill these blocks with zeros in all layers."""
        ...


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where one layer's blocks lie: in storage ``storage``, block 0 at byte ``offset``, then every ``stride`` bytes."""

    storage: int
    offset: int
    stride: int
    block_bytes: int


class HostCache:
    """A KV cache in this process's host memory.

    Args:
        engine: Registers the memory for reading by peers.
        storages: uint8[bytes] each, C order and writable; the caller keeps them alive until the engine is closed.
        places: One a layer, in the order of the model's layers.
        num_blocks: Blocks a layer has.

    Raises:
        ConfigError: A layer does not lie inside its storage, or its blocks overlap; nothing was registered.
    """

    def __init__(
        self, engine: TransferEngine, storages: Sequence[UInt8Array], places: Sequence[LayerPlace], num_blocks: int
    ) -> None:
        for layer, place in enumerate(places):
            _check_place(layer, place, [storage.size for storage in storages], num_blocks)
        self._storages, self._places = list(storages), list(places)
        regions = [engine.register(storage, rights=Rights.READ, name=f"kv-{i}") for i, storage in enumerate(storages)]
        self._layout = CacheLayout.of(
            [regions[place.storage].offset + place.offset for place in places],
            [place.stride for place in places],
            [place.block_bytes for place in places],
            num_blocks,
        )

    @property
    def layout(self) -> CacheLayout:
        return self._layout

    def checksums(self, layer0: int, layer1: int, block_ids: BlockIds, seeds: UInt64Array) -> UInt64Array:
        ids = np.asarray(block_ids, np.int64)
        by_layer = seeds.reshape(layer1 - layer0, len(ids))
        rows = [self._layer_checksums(layer0 + row, ids, by_layer[row]) for row in range(layer1 - layer0)]
        return np.concatenate(rows)

    def _layer_checksums(self, layer: int, ids: npt.NDArray[np.int64], seeds: UInt64Array) -> UInt64Array:
        place = self._places[layer]
        lengths = np.full(len(ids), place.block_bytes, np.int64)
        return block_checksums(self._storages[place.storage], place.offset + ids * place.stride, lengths, seeds)

    def zero(self, block_ids: BlockIds) -> None:
        for place in self._places:
            storage = self._storages[place.storage]
            for block_id in block_ids:
                start = place.offset + block_id * place.stride
                storage[start : start + place.block_bytes] = 0


def _check_place(layer: int, place: LayerPlace, sizes: Sequence[int], num_blocks: int) -> None:
    if not 0 <= place.storage < len(sizes):
        raise ConfigError("kv cache layer", layer, f"it lies in storage {place.storage} of {len(sizes)}")
    if not 0 < place.block_bytes <= place.stride:
        raise ConfigError("kv cache layer", layer, f"blocks of {place.block_bytes} bytes every {place.stride} overlap")
    end = place.offset + (num_blocks - 1) * place.stride + place.block_bytes
    if place.offset < 0 or end > sizes[place.storage]:
        raise ConfigError("kv cache layer", layer, f"it ends at byte {end} of {sizes[place.storage]}")
