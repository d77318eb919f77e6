"""Registered memory: places, bounds, rights, users."""

from __future__ import annotations

import mmap
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_plugins.errors import ClosedError, DeadlineExceededError, LocalUsageError, OutOfBoundsError
from mooncake_plugins.transfer import Rights
from mooncake_plugins.transfer._regions import RegionTable
from mooncake_plugins.wire import Deadline

ALL = Rights.READ | Rights.WRITE


def array(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, np.int64)


def test_places_are_disjoint_with_a_gap_and_never_used_again() -> None:
    table = RegionTable()
    first = table.add(bytearray(5000), ALL, "a")
    second = table.add(bytearray(1), ALL, "b")
    assert second.offset > first.offset + first.length
    table.close_region(first)
    table.remove(first, Deadline(0))
    assert table.add(bytearray(5000), ALL, "c").offset > second.offset


@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 2**63 - 1))
def test_bounds_at_the_edges_of_int64(offset: int, length: int) -> None:
    table = RegionTable()
    region = table.add(bytearray(100), ALL, "")
    inside = region.offset <= offset and offset + length <= region.offset + 100
    try:
        table.pin("local", array(offset), array(length), Rights.NONE).release()
        assert inside
    except OutOfBoundsError:
        assert not inside


def test_address_of_each_range() -> None:
    table = RegionTable()
    buffers = [np.zeros(1000, np.uint8) for _ in range(3)]
    regions = [table.add(buffer, ALL, "") for buffer in buffers]
    pin = table.pin("local", array(regions[2].offset + 5, regions[0].offset + 7), array(1, 1), Rights.NONE)
    assert pin.addresses.tolist() == [buffers[2].ctypes.data + 5, buffers[0].ctypes.data + 7]
    pin.release()


def test_a_range_may_not_span_two_regions() -> None:
    table = RegionTable()
    first = table.add(bytearray(4096), ALL, "")
    second = table.add(bytearray(4096), ALL, "")
    with pytest.raises(OutOfBoundsError):
        table.pin("local", array(first.offset), array(second.offset - first.offset + 1), Rights.NONE)


def test_rights_are_checked_per_range() -> None:
    table = RegionTable()
    free, closed = table.add(bytearray(10), ALL, ""), table.add(bytearray(10), Rights.READ, "")
    with pytest.raises(OutOfBoundsError, match="without the right WRITE") as caught:
        table.pin("remote", array(free.offset, closed.offset), array(1, 1), Rights.WRITE)
    assert caught.value.index == 1


def test_remove_waits_for_users() -> None:
    table = RegionTable()
    region = table.add(bytearray(10), ALL, "")
    pin = table.pin("local", array(region.offset), array(10), Rights.NONE)
    table.close_region(region)
    with pytest.raises(OutOfBoundsError, match="being unregistered"):
        table.pin("local", array(region.offset), array(1), Rights.NONE)
    with pytest.raises(DeadlineExceededError):
        table.remove(region, Deadline(0.01))
    thread = threading.Thread(target=pin.release)
    thread.start()
    table.remove(region, Deadline(10))
    thread.join()
    pin.release()
    assert table.registered_bytes == 0
    with pytest.raises(ClosedError):
        table.close_region(region)


def test_buffers_of_many_kinds() -> None:
    table = RegionTable()
    with mmap.mmap(-1, 4096) as mapped:
        kinds = [bytearray(3), memoryview(bytearray(4)), np.zeros((2, 3), np.float32), np.zeros(5, np.int16), mapped]
        sizes = [table.add(kind, ALL, "").length for kind in kinds]
        assert sizes == [3, 4, 24, 10, 4096]
        table.clear()
        del kinds


def test_read_only_memory_is_for_reading() -> None:
    table = RegionTable()
    with pytest.raises(LocalUsageError, match="read-only"):
        table.add(b"constant", ALL, "")
    region = table.add(b"constant", Rights.READ, "")
    table.pin("local", array(region.offset), array(8), Rights.READ).release()
    with pytest.raises(LocalUsageError, match="read-only"):
        table.pin("local", array(region.offset), array(8), Rights.NONE, writes=True)


@pytest.mark.parametrize("buffer", [b"", np.zeros((4, 4), np.uint8)[:, :2], 5, "text", None])
def test_what_cannot_be_registered(buffer: object) -> None:
    with pytest.raises(LocalUsageError):
        RegionTable().add(buffer, Rights.READ, "")


def test_registered_memory_cannot_be_resized_under_the_engine() -> None:
    table = RegionTable()
    buffer = bytearray(100)
    table.add(buffer, ALL, "")
    with pytest.raises(BufferError):
        buffer.extend(b"x" * 1000)
