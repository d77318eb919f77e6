"""Where the blocks of a KV cache lie in a segment, and which part of the model's KV they hold.

A paged cache is, for every layer, an array of equally long blocks. ``CacheLayout`` keeps one row of numbers a layer, so
that the byte offsets of any (layers x blocks) rectangle come out of one numpy expression.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from mooncake_plugins.errors import ConfigError

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Coordinate:
    """Which part of the model's KV one worker holds: its pipeline stage and its tensor-parallel rank."""

    pp: int = 0
    tp: int = 0
    pp_size: int = 1
    tp_size: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.pp < self.pp_size and 0 <= self.tp < self.tp_size):
            raise ConfigError("coordinate", str(self), "ranks must be below their sizes")

    def __str__(self) -> str:
        """The form used as a key in addresses: ``"pp,tp"``."""
        return f"{self.pp},{self.tp}"


def blocks_covering(tokens: int, block_size: int) -> int:
    """Count the blocks that hold ``tokens`` tokens, the last one perhaps partly filled."""
    return -(-tokens // block_size)


@dataclass(frozen=True, slots=True, eq=False)
class CacheLayout:
    """Place of every block of every layer in one segment.

    Attributes:
        base: int64[layers], segment offset in bytes of block 0 of each layer.
        stride: int64[layers], bytes from one block to the next.
        block_bytes: int64[layers], bytes of one block.
        num_blocks: blocks a layer has.

    Thread-safe: immutable.
    """

    base: Int64Array
    stride: Int64Array
    block_bytes: Int64Array
    num_blocks: int

    def __post_init__(self) -> None:
        if not (len(self.base) == len(self.stride) == len(self.block_bytes) > 0):
            raise ConfigError("cache layout", len(self.base), "base, stride and block_bytes need one entry a layer")
        if self.num_blocks < 1 or int(self.block_bytes.min()) < 1 or bool((self.stride < self.block_bytes).any()):
            raise ConfigError("cache layout", self.num_blocks, "blocks must have a length and must not overlap")

    @classmethod
    def of(cls, base: list[int], stride: list[int], block_bytes: list[int], num_blocks: int) -> Self:
        """Build from plain lists, as they come from a message or from tensors."""
        as_array = [np.asarray(column, dtype=np.int64) for column in (base, stride, block_bytes)]
        return cls(as_array[0], as_array[1], as_array[2], num_blocks)

    @property
    def num_layers(self) -> int:
        return len(self.base)

    def offsets(self, layer0: int, layer1: int, block_ids: Int64Array) -> Int64Array:
        """Return the segment offsets of a rectangle of blocks, layer by layer.

        Args:
            layer0: First layer.
            layer1: One past the last layer.
            block_ids: int64[n], physical block numbers, in sequence order.

        Returns:
            int64[(layer1 - layer0) * n], C order: all blocks of a layer, then those of the next.

        Raises:
            ConfigError: A layer or a block number does not exist; nothing was computed.
        """
        self._check(layer0, layer1, block_ids)
        return (self.base[layer0:layer1, None] + block_ids[None, :] * self.stride[layer0:layer1, None]).reshape(-1)

    def lengths(self, layer0: int, layer1: int, count: int) -> Int64Array:
        """Return int64[(layer1 - layer0) * count], the bytes of each block, in the order of ``offsets``."""
        return np.repeat(self.block_bytes[layer0:layer1], count)

    def span_bytes(self, layer0: int, layer1: int, count: int) -> int:
        """Sum the bytes of ``count`` blocks in these layers."""
        return int(self.block_bytes[layer0:layer1].sum()) * count

    def _check(self, layer0: int, layer1: int, block_ids: Int64Array) -> None:
        if not 0 <= layer0 < layer1 <= self.num_layers:
            raise ConfigError("layers", (layer0, layer1), f"this cache has layers 0 to {self.num_layers - 1}")
        outside = (block_ids < 0) | (block_ids >= self.num_blocks)
        if outside.any():
            first = int(block_ids[outside][0])
            raise ConfigError("block_ids", first, f"this cache has blocks 0 to {self.num_blocks - 1}")
