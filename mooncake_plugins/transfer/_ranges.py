"""Arrays of ranges: checked, merged and cut, without a Python object per range."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mooncake_plugins.errors import LocalUsageError
from mooncake_plugins.transports import Offsets

ArrayLike: TypeAlias = npt.ArrayLike

# What one request of the tcp transport may carry; also bounds the arrays of a work.
MAX_RANGES_PER_WORK = 16384
# Below this, one connection is faster than two.
STRIPE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Ranges after merging: ``first[i]`` is the first entry of the caller's arrays that went into run i."""

    local: Offsets
    remote: Offsets
    lengths: Offsets
    first: Offsets


def as_int64(values: ArrayLike, name: str) -> Offsets:
    """Return a one-dimensional int64 array.

    Raises:
        LocalUsageError: The values are not whole numbers in one dimension.
    """
    array = np.atleast_1d(np.asarray(values))
    if array.ndim != 1:
        raise LocalUsageError(f"{name} has {array.ndim} dimensions; one is expected")
    if array.size == 0:
        raise LocalUsageError(f"{name} is empty; a batch has at least one range")
    if not np.issubdtype(array.dtype, np.integer):
        raise LocalUsageError(f"{name} is {array.dtype}; int64 is expected")
    if array.dtype == np.uint64 and int(array.max()) > np.iinfo(np.int64).max:
        raise LocalUsageError(f"{name} holds {array.max()}, which int64 cannot")
    return np.ascontiguousarray(array, dtype=np.int64)


def check_lengths(lengths: Offsets) -> None:
    """Every range has at least one byte."""
    if int(lengths.min()) <= 0:
        index = int(np.argmax(lengths <= 0))
        raise LocalUsageError(f"range {index} has {int(lengths[index])} bytes; at least 1 is expected")


def check_sizes(**arrays: Offsets) -> None:
    """All arrays have the same number of entries."""
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) != 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise LocalUsageError(f"the arrays differ in length: {listed}")


def merge(local: Offsets, remote: Offsets, lengths: Offsets) -> Runs:
    """Join neighbours that are contiguous on both sides."""
    count = len(lengths)
    if count == 1:
        return Runs(local, remote, lengths, np.zeros(1, np.int64))
    is_break = local[1:] != local[:-1] + lengths[:-1]
    is_break |= remote[1:] != remote[:-1] + lengths[:-1]
    first = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(is_break) + 1))
    if len(first) == count:
        return Runs(local, remote, lengths, first)
    return Runs(local[first], remote[first], np.add.reduceat(lengths, first), first)


def slice_size(total_bytes: int, connections: int, limit_bytes: int) -> int:
    """Bytes per slice: all connections busy, none with crumbs."""
    return min(limit_bytes, max(STRIPE_BYTES, -(-total_bytes // connections)))


def cut(runs: Runs, slice_bytes: int) -> Iterator[Runs]:
    """Cut runs in slices of at most ``slice_bytes`` bytes and `MAX_RANGES_PER_WORK` ranges; order is kept."""
    ends = np.cumsum(runs.lengths)
    total, count = int(ends[-1]), len(runs.lengths)
    if total <= slice_bytes and count <= MAX_RANGES_PER_WORK:
        yield runs
        return
    done = 0
    while done < total:
        first = int(np.searchsorted(ends, done, "right"))
        stop_at = min(done + slice_bytes, total, int(ends[min(first + MAX_RANGES_PER_WORK, count) - 1]))
        last = int(np.searchsorted(ends, stop_at, "left"))
        yield _part(runs, ends, first, last + 1, done, stop_at)
        done = stop_at


def _part(runs: Runs, ends: Offsets, first: int, stop: int, begin_at: int, stop_at: int) -> Runs:
    """The bytes [begin_at, stop_at) of the runs, which lie in runs first..stop-1."""
    local, remote, lengths = (array[first:stop].copy() for array in (runs.local, runs.remote, runs.lengths))
    skipped = begin_at - (int(ends[first - 1]) if first else 0)
    local[0] += skipped
    remote[0] += skipped
    lengths[0] -= skipped
    lengths[-1] -= int(ends[stop - 1]) - stop_at
    return Runs(local, remote, lengths, runs.first[first:stop])
