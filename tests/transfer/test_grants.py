"""Grants, fences and quarantine."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mooncake_plugins.errors import GrantError, LocalUsageError, QuarantineFullError
from mooncake_plugins.transfer import EngineOptions, Fence, TransferEngine
from mooncake_plugins.transfer._grants import GrantedRanges, GrantTable
from mooncake_plugins.transports import Listener
from mooncake_plugins.wire import Deadline, Identity

WRITER = Identity("writer", "a" * 32)


def array(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, np.int64)


def table(limit: int = 1000, listeners: tuple[Listener, ...] = (), max_grants: int = 100) -> GrantTable:
    return GrantTable(max_grants, limit, lambda: listeners, lambda name: None)


class SlowFence(Listener):
    """The target side of a transport whose writers cannot be stopped at once."""

    def __init__(self) -> None:
        self.is_fenced = False

    @property
    def description(self) -> dict[str, str]:
        return {}

    def fence(self, token: bytes, deadline: Deadline) -> bool:
        return self.is_fenced

    def close(self) -> None:
        pass


def test_no_chunk_begins_after_revoke() -> None:
    grants = table()
    grant = grants.open(array(0), array(100), Deadline(60), None)
    assert grant.begin_chunk()
    grant.end_chunk()
    assert grant.revoke(0) is Fence.FENCED
    assert not grant.begin_chunk()
    assert grant.revoke(0) is Fence.FENCED


def test_chunk_in_progress_means_quarantine_until_it_ends() -> None:
    grants = table()
    grant = grants.open(array(0), array(100), Deadline(60), None)
    assert grant.begin_chunk()
    assert grant.revoke(0.01) is Fence.QUARANTINED
    assert grants.settle() == 100
    grant.end_chunk()
    assert grants.settle() == 0
    assert grant.is_fenced and grant.revoke(0) is Fence.FENCED


def test_revoke_waits_for_the_chunk_in_progress() -> None:
    grant = table().open(array(0), array(100), Deadline(60), None)
    assert grant.begin_chunk()
    found: list[Fence] = []
    thread = threading.Thread(target=lambda: found.append(grant.revoke(30)))
    thread.start()
    while grant.is_open:
        pass
    assert not found
    grant.end_chunk()
    thread.join(30)
    assert found == [Fence.FENCED]


def test_a_transport_that_cannot_promise_means_quarantine() -> None:
    listener = SlowFence()
    grants = table(listeners=(listener,))
    grant = grants.open(array(0), array(100), Deadline(60), None)
    assert grant.revoke(0.01) is Fence.QUARANTINED
    listener.is_fenced = True
    assert grant.revoke(0.01) is Fence.FENCED
    assert grants.settle() == 0


def test_quarantine_is_bounded() -> None:
    listener = SlowFence()
    grants = table(limit=150, listeners=(listener,))
    grants.open(array(0), array(100), Deadline(60), None).revoke(0)
    grants.open(array(200), array(50), Deadline(60), None).revoke(0)
    with pytest.raises(QuarantineFullError, match="150 bytes"):
        grants.open(array(400), array(1), Deadline(60), None)
    listener.is_fenced = True
    grants.open(array(400), array(1), Deadline(60), None)


def test_grants_are_bounded_and_expired_ones_make_room() -> None:
    grants = table(max_grants=2)
    grants.open(array(0), array(1), Deadline(0), None)
    grants.open(array(1), array(1), Deadline(60), None)
    grants.open(array(2), array(1), Deadline(60), None)
    with pytest.raises(LocalUsageError, match="2 grants are open"):
        grants.open(array(3), array(1), Deadline(60), None)


def test_tokens_are_unguessable_and_name_the_epoch() -> None:
    grants = table()
    tokens = {grants.open(array(0), array(1), Deadline(60), None).token for _ in range(50)}
    assert len(tokens) == 50 and {len(token) for token in tokens} == {32}
    assert sorted(int.from_bytes(token[:8], "big") for token in tokens) == list(range(1, 51))
    with pytest.raises(GrantError):
        grants.find(bytes(32))


def test_check_names_the_first_range_that_is_not_covered() -> None:
    grant = table().open(array(100, 50), array(10, 50), Deadline(60), None)
    grant.check(WRITER, array(50, 99), array(60, 2))
    for offset, length in ((49, 1), (110, 1), (100, 11), (-(2**63), 2**63 - 1), (2**63 - 1, 1)):
        with pytest.raises(GrantError, match="range 1"):
            grant.check(WRITER, array(50, offset), array(1, length))


def test_granted_ranges_may_not_overlap() -> None:
    with pytest.raises(LocalUsageError, match="overlap"):
        GrantedRanges.of(array(0, 5), array(6, 5))


def test_unregister_revokes_grants_of_the_region() -> None:
    with TransferEngine(EngineOptions(transports=("loopback",))) as engine:
        region = engine.register(np.zeros(100, np.uint8))
        grant = engine.grant([region.offset], [10], deadline_s=60)
        engine.unregister(region, 1)
        assert not grant.is_open and grant.is_fenced
        assert (engine.metrics()["grants_made"], engine.metrics()["grants_fenced"]) == (1, 1)
