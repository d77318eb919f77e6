"""Merging and cutting keep every byte in its place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_plugins.errors import LocalUsageError
from mooncake_plugins.transfer import _ranges
from mooncake_plugins.transfer._ranges import Runs, as_int64, check_lengths, check_sizes, cut, merge, slice_size


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Ranges that are often contiguous on one side or both."""
    local, remote, lengths = [0], [0], [draw(st.integers(1, 20))]
    for _ in range(draw(st.integers(0, 20))):
        local.append(local[-1] + lengths[-1] + draw(st.sampled_from([0, 0, 1, 7])))
        remote.append(remote[-1] + lengths[-1] + draw(st.sampled_from([0, 0, 1, 7])))
        lengths.append(draw(st.integers(1, 20)))
    return local, remote, lengths


def moves(runs: Runs) -> list[tuple[int, int]]:
    """(local byte, remote byte) of every byte."""
    return [
        (to + i, source + i)
        for to, source, length in zip(runs.local.tolist(), runs.remote.tolist(), runs.lengths.tolist(), strict=True)
        for i in range(length)
    ]


def as_runs(batch: tuple[list[int], list[int], list[int]]) -> Runs:
    local, remote, lengths = (np.array(part, np.int64) for part in batch)
    return Runs(local, remote, lengths, np.arange(len(local)))


@given(batches())
def test_merge_moves_the_same_bytes(batch: tuple[list[int], list[int], list[int]]) -> None:
    given_runs = as_runs(batch)
    merged = merge(given_runs.local, given_runs.remote, given_runs.lengths)
    assert moves(merged) == moves(given_runs)
    ends_here, ends_there = merged.local + merged.lengths, merged.remote + merged.lengths
    joins = (merged.local[1:] == ends_here[:-1]) & (merged.remote[1:] == ends_there[:-1])
    assert not joins.any(), "everything that can be merged is"


@given(batches(), st.integers(1, 50), st.integers(1, 5))
def test_cut_moves_the_same_bytes_within_its_limits(
    batch: tuple[list[int], list[int], list[int]], slice_bytes: int, max_ranges: int
) -> None:
    runs = as_runs(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ranges, "MAX_RANGES_PER_WORK", max_ranges)
        parts = list(cut(runs, slice_bytes))
    assert [move for part in parts for move in moves(part)] == moves(runs)
    for part in parts:
        assert int(part.lengths.min()) > 0
        assert int(part.lengths.sum()) <= slice_bytes
        assert len(part.lengths) <= max_ranges


def test_contiguous_blocks_become_one_run() -> None:
    starts = np.arange(1000, dtype=np.int64) * 4096
    runs = merge(starts, starts + 77, np.full(1000, 4096, np.int64))
    assert (runs.local.tolist(), runs.remote.tolist(), runs.lengths.tolist()) == ([0], [77], [4096000])


def test_slice_size_keeps_connections_busy_without_crumbs() -> None:
    assert slice_size(1000, 2, 1 << 24) == 1 << 20
    assert slice_size(8 << 20, 2, 1 << 24) == 4 << 20
    assert slice_size(1 << 30, 2, 1 << 24) == 1 << 24
    assert slice_size(1 << 30, 2, 4096) == 4096


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "empty"),
        ([[1], [2]], "2 dimensions"),
        ([1.0], "float64"),
        (["1"], "int64 is expected"),
        (np.array([2**63], np.uint64), "which int64 cannot"),
        ([None], "object"),
    ],
)
def test_arrays_that_cannot_be_used(values: object, reason: str) -> None:
    with pytest.raises(LocalUsageError, match=reason):
        as_int64(values, "local")  # type: ignore[arg-type]


def test_arrays_that_can() -> None:
    for values in (5, [1, 2], np.array([1], np.int32), np.array([1], np.uint64), np.arange(10)[::2]):
        assert as_int64(values, "x").dtype == np.int64
        assert as_int64(values, "x").flags.c_contiguous


def test_lengths_below_one_and_different_sizes() -> None:
    for bad in ([1, 0], [1, -5]):
        with pytest.raises(LocalUsageError, match="range 1 has"):
            check_lengths(as_int64(bad, "lengths"))
    with pytest.raises(LocalUsageError, match="local has 2, lengths has 1"):
        check_sizes(local=np.zeros(2, np.int64), lengths=np.zeros(1, np.int64))
