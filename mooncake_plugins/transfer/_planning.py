"""From the caller's arrays to works: checked, pinned, merged, cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mooncake_plugins.errors import IntegrityError, LocalUsageError, MooncakeError
from mooncake_plugins.transports import Integrity, Offsets, Opcode, Rights, Work
from mooncake_plugins.wire import Deadline

from ._ranges import ArrayLike, Runs, as_int64, check_lengths, check_sizes, cut, merge, slice_size
from ._regions import Pin, RegionTable

NO_TOKEN = bytes(32)


@dataclass(slots=True, eq=False)
class Plan:
    """A batch ready to be queued; ``pin`` keeps its local memory registered."""

    works: list[Work]
    pin: Pin
    deadline: Deadline
    total_bytes: int
    entries: int
    _remote: Offsets
    _lengths: Offsets

    def name_entries(self, work: Work, error: MooncakeError) -> MooncakeError:
        """Turn the ranges that a work's error names into entries of the caller's arrays."""
        if not isinstance(error, IntegrityError):
            return error
        found: set[int] = set()
        for i in error.indexes:
            start = int(work.remote[i])
            end = start + int(work.lengths[i])
            hit = (self._remote < end) & (self._remote + self._lengths > start)
            found.update(np.flatnonzero(hit).tolist())
        return IntegrityError(str(error), tuple(sorted(found)))


def plan_batch(
    regions: RegionTable,
    opcode: Opcode,
    local: ArrayLike,
    remote: ArrayLike,
    lengths: ArrayLike,
    deadline: Deadline,
    grant: bytes | None,
    integrity: Integrity,
    connections: int,
    slice_bytes: int,
) -> Plan:
    """Check a batch and cut it in works; see `TransferEngine.submit` for errors."""
    token = _checked_token(opcode, grant)
    here, there, sizes = as_int64(local, "local"), as_int64(remote, "remote"), as_int64(lengths, "lengths")
    check_sizes(local=here, remote=there, lengths=sizes)
    check_lengths(sizes)
    pin = regions.pin("local", here, sizes, Rights.NONE, writes=opcode is Opcode.READ)
    runs = merge(here, there, sizes)
    shifts = pin.addresses[runs.first] - here[runs.first]
    total = int(sizes.sum())
    works = [
        _work(opcode, part, shifts_of, token, deadline, integrity)
        for part, shifts_of in _slices(runs, shifts, slice_size(total, connections, slice_bytes))
    ]
    return Plan(works, pin, deadline, total, len(sizes), there, sizes)


def _slices(runs: Runs, shifts: Offsets, slice_bytes: int) -> list[tuple[Runs, Offsets]]:
    parts = list(cut(runs, slice_bytes))
    if len(parts) == 1:
        return [(parts[0], shifts)]
    return [(part, shifts[np.searchsorted(runs.first, part.first)]) for part in parts]


def _work(opcode: Opcode, part: Runs, shifts: Offsets, token: bytes, deadline: Deadline, integrity: Integrity) -> Work:
    total = int(part.lengths.sum())
    return Work(opcode, part.local, part.local + shifts, part.remote, part.lengths, total, deadline, token, integrity)


def _checked_token(opcode: Opcode, grant: bytes | None) -> bytes:
    if opcode is Opcode.READ:
        if grant is not None:
            raise LocalUsageError("a READ takes no grant")
        return NO_TOKEN
    if grant is None or len(grant) != len(NO_TOKEN):
        raise LocalUsageError("a WRITE needs the token of a grant of the peer (`Grant.token`)")
    return grant
