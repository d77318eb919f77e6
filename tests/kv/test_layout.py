"""Layouts: the numpy arithmetic against plain loops, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_plugins.errors import ConfigError
from mooncake_plugins.kv import CacheLayout, Coordinate, blocks_covering


@st.composite
def layouts(draw: st.DrawFn) -> CacheLayout:
    """Layers of different places, strides and block lengths, as hybrid and padded caches have them."""
    layers = draw(st.integers(1, 6))
    block_bytes = [draw(st.integers(1, 1 << 22)) for _ in range(layers)]
    stride = [size + draw(st.integers(0, 1 << 20)) for size in block_bytes]
    base = [draw(st.integers(0, 1 << 45)) for _ in range(layers)]
    return CacheLayout.of(base, stride, block_bytes, draw(st.integers(1, 1 << 20)))


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[CacheLayout, int, int, list[int]]:
    layout = draw(layouts())
    layer0 = draw(st.integers(0, layout.num_layers - 1))
    layer1 = draw(st.integers(layer0 + 1, layout.num_layers))
    block_ids = draw(st.lists(st.integers(0, layout.num_blocks - 1), max_size=8))
    return layout, layer0, layer1, block_ids


@given(rectangles())
def test_offsets_and_lengths_equal_a_plain_loop(rectangle: tuple[CacheLayout, int, int, list[int]]) -> None:
    layout, layer0, layer1, block_ids = rectangle
    offsets, lengths = [], []
    for layer in range(layer0, layer1):
        for block_id in block_ids:
            offsets.append(int(layout.base[layer]) + block_id * int(layout.stride[layer]))
            lengths.append(int(layout.block_bytes[layer]))
    ids = np.asarray(block_ids, np.int64)
    assert layout.offsets(layer0, layer1, ids).tolist() == offsets
    assert layout.lengths(layer0, layer1, len(block_ids)).tolist() == lengths
    assert layout.span_bytes(layer0, layer1, len(block_ids)) == sum(lengths)


def test_blocks_of_a_rectangle_never_overlap() -> None:
    layout = CacheLayout.of([0, 640], [64, 80], [64, 80], 8)
    ids = np.arange(8, dtype=np.int64)
    offsets, lengths = layout.offsets(0, 2, ids), layout.lengths(0, 2, 8)
    touched = np.concatenate([np.arange(o, o + n) for o, n in zip(offsets, lengths, strict=True)])
    assert len(np.unique(touched)) == len(touched)


@pytest.mark.parametrize("layers", [(-1, 1), (0, 0), (1, 1), (2, 1), (0, 3)])
def test_layers_that_do_not_exist_are_refused(layers: tuple[int, int]) -> None:
    layout = CacheLayout.of([0, 64], [8, 8], [8, 8], 4)
    with pytest.raises(ConfigError, match="layers"):
        layout.offsets(*layers, np.zeros(1, np.int64))


@pytest.mark.parametrize(("block_ids", "named"), [([0, 4], "4"), ([-1, 0], "-1"), ([1 << 40], str(1 << 40))])
def test_blocks_that_do_not_exist_are_refused_by_number(block_ids: list[int], named: str) -> None:
    layout = CacheLayout.of([0], [8], [8], 4)
    with pytest.raises(ConfigError, match=f"block_ids: {named} "):
        layout.offsets(0, 1, np.asarray(block_ids, np.int64))


@pytest.mark.parametrize(
    ("base", "stride", "block_bytes", "num_blocks"),
    [
        ([], [], [], 4),
        ([0], [8, 8], [8], 4),
        ([0], [8], [8], 0),
        ([0], [8], [0], 4),
        ([0], [4], [8], 4),
        ([0], [-8], [-8], 4),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    base: list[int], stride: list[int], block_bytes: list[int], num_blocks: int
) -> None:
    with pytest.raises(ConfigError, match="cache layout"):
        CacheLayout.of(base, stride, block_bytes, num_blocks)


@given(st.integers(0, 1 << 20), st.integers(1, 512))
def test_blocks_covering_is_the_least_number_that_holds_the_tokens(tokens: int, block_size: int) -> None:
    blocks = blocks_covering(tokens, block_size)
    assert blocks * block_size >= tokens
    assert (blocks - 1) * block_size < tokens or blocks == 0


def test_a_coordinate_is_written_as_it_is_in_addresses() -> None:
    assert str(Coordinate()) == "0,0"
    assert str(Coordinate(pp=1, tp=3, pp_size=2, tp_size=4)) == "1,3"


@pytest.mark.parametrize("ranks", [(1, 0, 1, 1), (0, 1, 1, 1), (-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1)])
def test_a_rank_outside_its_group_is_refused(ranks: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError, match="coordinate"):
        Coordinate(*ranks)
