"""A cache in host memory: its layout, hashing and zeroing, and what is refused before anything is registered."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mooncake_plugins.errors import ConfigError
from mooncake_plugins.handoff import HostCache, LayerPlace
from mooncake_plugins.kv import block_checksums, span_seeds
from mooncake_plugins.transfer import EngineOptions, TransferEngine
from tests.handoff.harness import Memory


@pytest.fixture
def engine(leak_check: None) -> Iterator[TransferEngine]:
    with TransferEngine(EngineOptions(transports=("loopback",))) as engine:
        yield engine


def test_the_layout_is_in_the_address_space_of_the_segment(engine: TransferEngine) -> None:
    memory = Memory(layers=3, blocks=4, block_bytes=64, pad=16)
    layout = HostCache(engine, memory.storages, memory.places, 4).layout
    first, second = sorted((region for region in engine.description.regions), key=lambda region: region.name)
    assert layout.base.tolist() == [first.offset, first.offset + 4 * 80, second.offset]
    assert layout.stride.tolist() == [80, 80, 80 + 2 * 64]
    assert layout.block_bytes.tolist() == [64, 64, 64] and layout.num_blocks == 4


def test_blocks_are_hashed_layer_by_layer_in_the_order_that_is_asked_for(engine: TransferEngine) -> None:
    memory = Memory(layers=3, blocks=4, block_bytes=64, pad=16)
    for layer in range(3):
        memory.write(b"p", layer, [0, 1, 2, 3])
    seeds = span_seeds("t", 1, 3, 5, 7)
    sums = HostCache(engine, memory.storages, memory.places, 4).checksums(1, 3, [2, 0], seeds)
    one, size = np.zeros(1, np.int64), np.full(1, 64, np.int64)
    blocks = [memory.block(layer, block) for layer in (1, 2) for block in (2, 0)]
    assert sums.tolist() == [int(block_checksums(b, one, size, seeds[i : i + 1])[0]) for i, b in enumerate(blocks)]


def test_zeroing_touches_nothing_but_the_blocks_that_are_named(engine: TransferEngine) -> None:
    memory = Memory(layers=4, blocks=6, block_bytes=64, pad=16)
    for storage in memory.storages:
        storage[:] = 0xEE
    cache = HostCache(engine, memory.storages, memory.places, 6)
    cache.zero([])
    assert all((storage == 0xEE).all() for storage in memory.storages)
    cache.zero([4, 1])
    assert memory.holds_only([1, 4], 0) and memory.holds_only([0, 2, 3, 5], 0xEE)
    assert sum(int((storage == 0).sum()) for storage in memory.storages) == 2 * 4 * 64, "no padding either"


@pytest.mark.parametrize(
    "place",
    [
        LayerPlace(0, 1, 64, 64),
        LayerPlace(0, -1, 64, 64),
        LayerPlace(0, 0, 65, 64),
        LayerPlace(0, 0, 64, 65),
        LayerPlace(0, 0, 32, 64),
        LayerPlace(1, 0, 64, 64),
        LayerPlace(-1, 0, 64, 64),
    ],
)
def test_a_layer_that_does_not_lie_in_its_storage_is_refused_and_nothing_is_registered(
    engine: TransferEngine, place: LayerPlace
) -> None:
    with pytest.raises(ConfigError):
        HostCache(engine, [np.zeros(4 * 64, np.uint8)], [LayerPlace(0, 0, 64, 64), place], 4)
    assert engine.description.regions == ()
