"""Registered memory and its place in the segment's address space.

A segment is a 63-bit address space. Every registered buffer gets a place in it that no other buffer of this engine
ever gets again, with a gap after it: an offset that outlives its region is refused instead of meeting other memory,
and ranges that are contiguous in the segment are always in one region.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake_plugins.errors import ClosedError, DeadlineExceededError, LocalUsageError, OutOfBoundsError
from mooncake_plugins.transports import Addresses, Offsets, Rights
from mooncake_plugins.wire import Deadline

FIRST_OFFSET = 1 << 20
ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Region:
    """A registered buffer: the bytes [offset, offset + length) of this engine's segment."""

    offset: int
    length: int
    rights: Rights
    name: str = ""
    is_writable: bool = True


@dataclass(slots=True, eq=False)
class _Entry:
    region: Region
    memory: npt.NDArray[np.uint8]  # keeps the buffer alive and exported
    address: int
    users: int = 0
    is_closing: bool = False
    handles: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    """The table as arrays, sorted by offset; replaced as a whole."""

    entries: tuple[_Entry, ...]
    starts: Offsets
    ends: Offsets
    shifts: Offsets  # address - offset
    rights: Offsets


def as_bytes(buffer: Any) -> npt.NDArray[np.uint8]:
    """Return a flat uint8 view of a buffer, without copying.

    Raises:
        LocalUsageError: It is no buffer, is not contiguous, or is empty.
    """
    try:
        if isinstance(buffer, np.ndarray):
            if not buffer.flags.c_contiguous:
                raise LocalUsageError(
                    "the array is not C-contiguous; register a contiguous buffer and use offsets in it"
                )
            memory = buffer.reshape(-1).view(np.uint8)
        else:
            memory = np.frombuffer(buffer, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise LocalUsageError(f"{type(buffer).__name__} cannot be registered: {error}") from error
    if memory.size == 0:
        raise LocalUsageError("an empty buffer cannot be registered")
    return memory


class Pin:
    """Keeps the regions of some ranges registered until ``release``."""

    __slots__ = ("_entries", "_table", "addresses")

    def __init__(self, table: RegionTable, entries: tuple[_Entry, ...], addresses: Addresses) -> None:
        self._table, self._entries = table, entries
        self.addresses = addresses

    def release(self) -> None:
        """Let the regions go. Idempotent."""
        entries, self._entries = self._entries, ()
        if entries:
            self._table._unpin(entries)


class RegionTable:
    """The registered buffers of one engine. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._entries: dict[int, _Entry] = {}
        self._next = FIRST_OFFSET
        self._snapshot = _snapshot_of({})

    @property
    def registered_bytes(self) -> int:
        """Bytes registered now."""
        return sum(entry.region.length for entry in self._snapshot.entries)

    def entries(self) -> tuple[tuple[Region, int, dict[str, bytes]], ...]:
        """(region, process address, transport handles) of every registered buffer, in order of offset."""
        return tuple((e.region, e.address, e.handles) for e in self._snapshot.entries if not e.is_closing)

    def add(self, buffer: Any, rights: Rights, name: str) -> Region:
        """Give a buffer its place; see `TransferEngine.register`."""
        memory = as_bytes(buffer)
        if Rights.WRITE in rights and not memory.flags.writeable:
            raise LocalUsageError("the buffer is read-only; register it with rights=Rights.READ")
        with self._changed:
            region = Region(self._next, memory.size, rights, name, bool(memory.flags.writeable))
            self._next += -(-memory.size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
            self._entries[region.offset] = _Entry(region, memory, int(memory.ctypes.data))
            self._snapshot = _snapshot_of(self._entries)
        return region

    def set_handles(self, region: Region, handles: dict[str, bytes]) -> None:
        """Note what transports told about a region."""
        with self._changed:
            self._entries[region.offset].handles.update(handles)

    def address_of(self, region: Region) -> int:
        """Where a region lies in this process.

        Raises:
            ClosedError: It is not registered here.
        """
        entry = self._entries.get(region.offset)
        if entry is None or entry.region != region:
            raise ClosedError(f"region {region.name!r} at {region.offset} is not registered here")
        return entry.address

    def close_region(self, region: Region) -> None:
        """Admit no new user of a region."""
        self.address_of(region)
        with self._changed:
            self._entries[region.offset].is_closing = True

    def reopen_region(self, region: Region) -> None:
        """Undo ``close_region``."""
        with self._changed:
            if region.offset in self._entries:
                self._entries[region.offset].is_closing = False

    def remove(self, region: Region, deadline: Deadline) -> None:
        """Forget a closed region once its last user has gone.

        Raises:
            DeadlineExceededError: It is still in use; nothing changed.
        """
        with self._changed:
            entry = self._entries[region.offset]
            if not self._changed.wait_for(lambda: entry.users == 0, deadline.remaining_s):
                raise DeadlineExceededError(f"region {region.name!r} at {region.offset} is still in use by transfers")
            self._entries.pop(region.offset, None)
            self._snapshot = _snapshot_of(self._entries)

    def pin(self, side: str, offsets: Offsets, lengths: Offsets, needed: Rights, *, writes: bool = False) -> Pin:
        """Check ranges against the table and keep their regions registered.

        Args:
            side: "local" or "remote", for the error.
            offsets: int64[n].
            lengths: int64[n], > 0.
            needed: Rights that every range's region must have.
            writes: The memory will be written, so it must be writable.

        Raises:
            OutOfBoundsError: The first range that is not inside a region, or lacks a right.
        """
        table = self._snapshot
        index = np.searchsorted(table.starts, offsets, "right") - 1
        self._check(side, table, index, offsets, lengths, needed)
        entries = self._used(table, index)
        if writes:
            for entry in entries:
                if not entry.region.is_writable:
                    raise LocalUsageError(f"region {entry.region.name!r} at {entry.region.offset} is read-only")
        with self._changed:
            for entry in entries:
                if entry.is_closing:
                    raise self._closing(side, table, entry, index, offsets, lengths)
            for entry in entries:
                entry.users += 1
        return Pin(self, entries, offsets + table.shifts[index])

    @staticmethod
    def _check(side: str, table: _Snapshot, index: Offsets, offsets: Offsets, lengths: Offsets, needed: Rights) -> None:
        if not table.entries:
            raise OutOfBoundsError(side, 0, int(offsets[0]), int(lengths[0]))
        # length <= end - offset cannot overflow: offset is at or after the region's start.
        is_inside = (index >= 0) & (lengths <= table.ends[index] - offsets)
        if not is_inside.all():
            bad = int(np.argmin(is_inside))
            raise OutOfBoundsError(side, bad, int(offsets[bad]), int(lengths[bad]))
        has_rights = (table.rights[index] & needed.value) == needed.value
        if not has_rights.all():
            bad = int(np.argmin(has_rights))
            missing = f"is registered without the right {needed.name}"
            raise OutOfBoundsError(side, bad, int(offsets[bad]), int(lengths[bad]), missing)

    @staticmethod
    def _used(table: _Snapshot, index: Offsets) -> tuple[_Entry, ...]:
        if len(index) == 1:
            return (table.entries[int(index[0])],)
        used = np.flatnonzero(np.bincount(index, minlength=len(table.entries)))
        return tuple(table.entries[i] for i in used.tolist())

    @staticmethod
    def _closing(
        side: str, table: _Snapshot, entry: _Entry, index: Offsets, offsets: Offsets, lengths: Offsets
    ) -> OutOfBoundsError:
        bad = int(np.argmax(index == table.entries.index(entry)))
        return OutOfBoundsError(side, bad, int(offsets[bad]), int(lengths[bad]), "is being unregistered")

    def _unpin(self, entries: tuple[_Entry, ...]) -> None:
        with self._changed:
            for entry in entries:
                entry.users -= 1
            self._changed.notify_all()

    def clear(self) -> None:
        """Forget everything; only when no transfer is under way."""
        with self._changed:
            self._entries.clear()
            self._snapshot = _snapshot_of({})


def _snapshot_of(entries: dict[int, _Entry]) -> _Snapshot:
    ordered = tuple(entries[offset] for offset in sorted(entries))
    starts = np.array([e.region.offset for e in ordered], np.int64)
    ends = np.array([e.region.offset + e.region.length for e in ordered], np.int64)
    addresses = np.array([e.address for e in ordered], np.int64)
    rights = np.array([e.region.rights.value for e in ordered], np.int64)
    return _Snapshot(ordered, starts, ends, addresses - starts, rights)
