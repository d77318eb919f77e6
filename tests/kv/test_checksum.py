"""Checksums: wrong bytes, and right bytes in the wrong place."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from mooncake_plugins.kv import block_checksums, span_seeds

BLOCK_BYTES = 64
BLOCKS = 6


def memory_of(seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, BLOCK_BYTES * BLOCKS, np.uint8)


def sums(memory: npt.NDArray[np.uint8], order: list[int], seeds: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    offsets = np.asarray(order, np.int64) * BLOCK_BYTES
    return block_checksums(memory, offsets, np.full(len(order), BLOCK_BYTES, np.int64), seeds)


def test_equal_bytes_of_the_same_place_have_equal_checksums_wherever_they_lie() -> None:
    here = memory_of(1)
    there = np.zeros_like(here)
    order = [4, 0, 5, 2, 1, 3]
    for place, block in enumerate(order):
        there[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES] = here[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
    seeds = span_seeds("t", 0, 1, 10, 10 + BLOCKS)
    assert (sums(here, order, seeds) == sums(there, list(range(BLOCKS)), seeds)).all()


@given(st.integers(0, BLOCK_BYTES * BLOCKS - 1), st.integers(1, 255))
def test_a_changed_byte_is_seen_in_its_block_and_no_other(position: int, change: int) -> None:
    memory = memory_of(2)
    seeds = span_seeds("t", 0, 1, 0, BLOCKS)
    before = sums(memory, list(range(BLOCKS)), seeds)
    memory[position] ^= change
    after = sums(memory, list(range(BLOCKS)), seeds)
    assert np.flatnonzero(before != after).tolist() == [position // BLOCK_BYTES]


def test_swapped_blocks_are_seen() -> None:
    memory = memory_of(3)
    seeds = span_seeds("t", 0, 1, 0, BLOCKS)
    right, swapped = sums(memory, [0, 1, 2, 3], seeds[:4]), sums(memory, [0, 2, 1, 3], seeds[:4])
    assert np.flatnonzero(right != swapped).tolist() == [1, 2]


def test_equal_blocks_in_different_places_have_different_checksums() -> None:
    zeros = np.zeros(BLOCK_BYTES * BLOCKS, np.uint8)
    assert len(set(sums(zeros, list(range(BLOCKS)), span_seeds("t", 0, 1, 0, BLOCKS)).tolist())) == BLOCKS


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "0" * 32]), st.integers(0, 200), st.integers(0, 1 << 20)),
        min_size=2,
        max_size=2,
        unique=True,
    )
)
def test_every_transfer_layer_and_place_has_a_seed_of_its_own(cells: list[tuple[str, int, int]]) -> None:
    (name, layer, block), (other_name, other_layer, other_block) = cells
    one = span_seeds(name, layer, layer + 1, block, block + 1)
    other = span_seeds(other_name, other_layer, other_layer + 1, other_block, other_block + 1)
    assert one.tolist() != other.tolist()


def test_two_transfers_have_no_seed_in_common() -> None:
    one, other = span_seeds("a" * 32, 0, 80, 0, 100), span_seeds("b" * 32, 0, 80, 0, 100)
    assert len(np.unique(np.concatenate([one, other]))) == 2 * 80 * 100


@given(st.integers(0, 5), st.integers(1, 5), st.integers(0, 50), st.integers(1, 5))
def test_seeds_of_a_span_are_those_of_its_cells_layer_by_layer(
    layer: int, layers: int, block: int, blocks: int
) -> None:
    whole = span_seeds("t", layer, layer + layers, block, block + blocks)
    cells = [
        span_seeds("t", one, one + 1, place, place + 1)[0]
        for one in range(layer, layer + layers)
        for place in range(block, block + blocks)
    ]
    assert whole.tolist() == cells


def test_hashing_reads_only() -> None:
    memory = memory_of(4)
    memory.flags.writeable = False
    copy = memory.copy()
    sums(memory, [0, 1], span_seeds("t", 0, 1, 0, 2))
    assert (memory == copy).all()


def test_ranges_may_have_different_lengths() -> None:
    memory = memory_of(5)
    seeds = span_seeds("t", 0, 2, 0, 1)
    mixed = block_checksums(memory, np.array([0, 64]), np.array([64, 16]), seeds)
    alone = [
        block_checksums(memory, np.array([0]), np.array([64]), seeds[:1])[0],
        block_checksums(memory, np.array([64]), np.array([16]), seeds[1:])[0],
    ]
    assert mixed.tolist() == alone
    assert block_checksums(memory, np.empty(0, np.int64), np.empty(0, np.int64), seeds[:0]).size == 0
