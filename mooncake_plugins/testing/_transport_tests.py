"""What every transport must do. Inherit, set ``transport``, and pytest does the rest.

Two engines of one process move bytes through the transport under test and no other. What a transport does not declare
in ``capabilities`` is skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from mooncake_plugins.errors import (
    ClosedError,
    DeadlineExceededError,
    GrantError,
    LocalUsageError,
    OutOfBoundsError,
    PeerClosedError,
    RejectedError,
)
from mooncake_plugins.transfer import (
    BatchStatus,
    EngineOptions,
    Fence,
    Integrity,
    Opcode,
    Peer,
    Region,
    Rights,
    TransferEngine,
)
from mooncake_plugins.transports import Capability, Transport

from ._leaks import leak_check
from ._waiting import wait_until

if TYPE_CHECKING:
    from mooncake_plugins.plugins import PluginRegistry

__all__ = ["TransportTests", "leak_check"]

Memory = npt.NDArray[np.uint8]
SIZE = 4 << 20


@dataclass(slots=True, eq=False)
class Pair:
    """Two engines, each with one region of random bytes; ``here`` has opened ``there``."""

    here: TransferEngine
    there: TransferEngine
    mine: Memory
    theirs: Memory
    my_region: Region
    their_region: Region
    peer: Peer

    def read(self, local: Any, remote: Any, lengths: Any, **options: Any) -> None:
        """READ with offsets relative to the regions."""
        self.here.read(self.peer, *self.place(local, remote), lengths, **{"deadline_s": 20.0, **options})

    def write(self, local: Any, remote: Any, lengths: Any, **options: Any) -> None:
        """WRITE with offsets relative to the regions."""
        self.here.write(self.peer, *self.place(local, remote), lengths, **{"deadline_s": 20.0, **options})

    def place(self, local: Any, remote: Any) -> tuple[Any, Any]:
        """Offsets in the segments of offsets in the regions."""
        return np.asarray(local) + self.my_region.offset, np.asarray(remote) + self.their_region.offset


class TransportTests:
    """Conformance of a transport.

    Attributes:
        transport: Its name.
    """

    transport: ClassVar[str]

    def registry(self) -> PluginRegistry | None:
        """The registry that offers the transport; None: the installed plugins."""
        return None

    def make(self, **options: Any) -> TransferEngine:
        """An engine that uses this transport only."""
        return TransferEngine(EngineOptions(transports=(self.transport,), **options), registry=self.registry())

    @pytest.fixture
    def pair(self, leak_check: None) -> Iterator[Pair]:
        """Two engines."""
        random = np.random.default_rng(7)
        mine, theirs = (random.integers(0, 256, SIZE, np.uint8) for _ in range(2))
        with self.make() as here, self.make() as there:
            regions = here.register(mine), there.register(theirs)
            yield Pair(here, there, mine, theirs, *regions, here.open(there.address, timeout_s=10))

    def need(self, pair: Pair, *wanted: Capability) -> None:
        """Skip unless the transport declares what a test is about."""
        transport: Transport = pair.here._transports[self.transport]
        missing = [capability.value for capability in wanted if capability not in transport.capabilities]
        if missing:
            pytest.skip(f"{self.transport} does not offer {', '.join(missing)}")

    # -- which way

    def test_uses_this_transport_and_says_why(self, pair: Pair) -> None:
        assert pair.peer.path.transport == self.transport
        assert pair.peer.path.reason

    # -- READ

    def test_read_one_range(self, pair: Pair) -> None:
        before = pair.mine.copy()
        pair.read([100], [3000], [5000])
        assert (pair.mine[100:5100] == pair.theirs[3000:8000]).all()
        assert (pair.mine[:100] == before[:100]).all() and (pair.mine[5100:] == before[5100:]).all()

    def test_read_whole_region(self, pair: Pair) -> None:
        pair.read([0], [0], [SIZE])
        assert (pair.mine == pair.theirs).all()

    @pytest.mark.parametrize("block", [1, 17, 4096, 70000])
    def test_read_scattered(self, pair: Pair, block: int) -> None:
        count = min(2000, SIZE // block)
        random = np.random.default_rng(block)
        local, remote = (random.permutation(SIZE // block)[:count] * block for _ in range(2))
        expected = pair.mine.copy()
        for to, source in zip(local.tolist(), remote.tolist(), strict=True):
            expected[to : to + block] = pair.theirs[source : source + block]
        pair.read(local, remote, np.full(count, block))
        assert (pair.mine == expected).all()

    def test_read_ranges_of_different_lengths(self, pair: Pair) -> None:
        lengths = np.random.default_rng(3).integers(1, 9000, 300)
        starts = np.cumsum(lengths + 5) - lengths
        expected = pair.mine.copy()
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            expected[start : start + length] = pair.theirs[start + 3 : start + 3 + length]
        pair.read(starts, starts + 3, lengths)
        assert (pair.mine == expected).all()

    def test_read_one_hundred_thousand_ranges(self, pair: Pair) -> None:
        order = np.random.default_rng(5).permutation(100_000) * 32
        pair.read(order[::-1].copy(), order, np.full(100_000, 20))
        expected = pair.theirs[order[:, None] + np.arange(20)]
        assert (pair.mine[order[::-1][:, None] + np.arange(20)] == expected).all()

    def test_read_adjacent_blocks(self, pair: Pair) -> None:
        starts = np.arange(64) * 4096
        pair.read(starts, starts + 8192, np.full(64, 4096))
        assert (pair.mine[: 64 * 4096] == pair.theirs[8192 : 8192 + 64 * 4096]).all()

    def test_read_over_several_regions(self, pair: Pair) -> None:
        more = np.zeros(1000, np.uint8)
        second = pair.here.register(more)
        local = [pair.my_region.offset, second.offset]
        remote = np.array([0, 5000]) + pair.their_region.offset
        pair.here.read(pair.peer, local, remote, [1000, 1000], deadline_s=10)
        assert (pair.mine[:1000] == pair.theirs[:1000]).all() and (more == pair.theirs[5000:6000]).all()

    def test_submit_reports_progress_and_path(self, pair: Pair) -> None:
        local, remote = pair.place([0], [0])
        batch = pair.here.submit(pair.peer, Opcode.READ, local, remote, [SIZE], deadline_s=20)
        assert batch.wait(20) is BatchStatus.DONE
        assert (batch.bytes_done, batch.error, batch.path) == (SIZE, None, self.transport)
        assert pair.here.metrics()["bytes_read"] == SIZE
        wait_until(lambda: pair.there.metrics()["bytes_served_read"] == SIZE, "the target to count what it served")

    def test_read_with_checksums(self, pair: Pair) -> None:
        self.need(pair, Capability.INTEGRITY)
        order = np.random.default_rng(2).permutation(50) * 60_000
        pair.read(order, order[::-1].copy(), np.full(50, 60_000), integrity=Integrity.XXH3_64)
        expected = pair.theirs[order[::-1][:, None] + np.arange(60_000)]
        assert (pair.mine[order[:, None] + np.arange(60_000)] == expected).all()

    # -- WRITE

    def test_write_under_a_grant(self, pair: Pair) -> None:
        self.need(pair, Capability.WRITE)
        before = pair.theirs.copy()
        grant = pair.there.grant([pair.their_region.offset + 4096], [600_000], deadline_s=30)
        pair.write([0], [5000], [500_000], grant=grant.token)
        assert (pair.theirs[5000:505_000] == pair.mine[:500_000]).all()
        assert (pair.theirs[:5000] == before[:5000]).all() and (pair.theirs[505_000:] == before[505_000:]).all()
        assert grant.revoke(10) is Fence.FENCED

    def test_write_scattered_with_checksums(self, pair: Pair) -> None:
        self.need(pair, Capability.WRITE, Capability.INTEGRITY)
        grant = pair.there.grant([pair.their_region.offset], [SIZE], deadline_s=30)
        order = np.random.default_rng(9).permutation(200) * 20_000
        pair.write(order[::-1].copy(), order, np.full(200, 20_000), grant=grant.token, integrity=Integrity.XXH3_64)
        expected = pair.mine[order[::-1][:, None] + np.arange(20_000)]
        assert (pair.theirs[order[:, None] + np.arange(20_000)] == expected).all()

    def test_write_needs_a_grant_that_covers_it(self, pair: Pair) -> None:
        self.need(pair, Capability.WRITE)
        before = pair.theirs.copy()
        grant = pair.there.grant(np.array([0, 50_000]) + pair.their_region.offset, [10_000, 10_000], deadline_s=30)
        with pytest.raises(LocalUsageError):
            pair.write([0], [0], [100], grant=None)
        for remote, length in ((9_999, 2), (20_000, 10), (0, 60_000), (49_999, 1)):
            with pytest.raises(GrantError):
                pair.write([0], [remote], [length], grant=grant.token)
        with pytest.raises(GrantError):
            pair.write([0], [0], [10], grant=bytes(32))
        assert (pair.theirs == before).all()

    def test_write_after_revoke_or_expiry_is_refused(self, pair: Pair) -> None:
        self.need(pair, Capability.WRITE)
        before = pair.theirs.copy()
        revoked = pair.there.grant([pair.their_region.offset], [1000], deadline_s=30)
        assert revoked.revoke(10) is Fence.FENCED
        expired = pair.there.grant([pair.their_region.offset], [1000], deadline_s=0)
        for grant in (revoked, expired):
            with pytest.raises(GrantError):
                pair.write([0], [0], [1000], grant=grant.token)
        assert (pair.theirs == before).all()
        assert pair.there.quarantined_bytes == 0

    def test_grant_is_bound_to_its_peer(self, pair: Pair) -> None:
        self.need(pair, Capability.WRITE)
        stranger = pair.there.grant([pair.their_region.offset], [1000], deadline_s=30, peer="0" * 32)
        with pytest.raises(GrantError):
            pair.write([0], [0], [1000], grant=stranger.token)
        mine = pair.there.grant([pair.their_region.offset], [1000], deadline_s=30, peer=pair.here.incarnation)
        pair.write([0], [0], [1000], grant=mine.token)

    # -- bounds and rights

    @pytest.mark.parametrize("remote", [-(1 << 30), -1, SIZE - 99, SIZE, 1 << 40, (1 << 62)])
    def test_remote_range_out_of_bounds(self, pair: Pair, remote: int) -> None:
        before = pair.mine.copy()
        with pytest.raises(RejectedError, match="range 1"):
            pair.read([0, 200], [0, remote], [100, 100])
        assert (pair.mine == before).all()
        pair.read([0], [0], [100])  # the way is still good

    @pytest.mark.parametrize("local", [-(1 << 30), -1, SIZE - 99, SIZE, 1 << 40])
    def test_local_range_out_of_bounds(self, pair: Pair, local: int) -> None:
        before = pair.mine.copy()
        with pytest.raises(OutOfBoundsError) as caught:
            pair.read([0, local], [0, 200], [100, 100])
        assert caught.value.index == 1
        assert (pair.mine == before).all() and pair.here.metrics()["batches_submitted"] == 0

    def test_rights_of_a_region(self, pair: Pair) -> None:
        secret = pair.there.register(np.zeros(100, np.uint8), rights=Rights.NONE)
        with pytest.raises(RejectedError):
            pair.here.read(pair.peer, [pair.my_region.offset], [secret.offset], [10], deadline_s=10)
        with pytest.raises(OutOfBoundsError):
            pair.there.grant([secret.offset], [10], deadline_s=10)

    def test_unregistered_remote_range(self, pair: Pair) -> None:
        pair.there.unregister(pair.their_region, 10)
        with pytest.raises(RejectedError):
            pair.read([0], [0], [10])

    # -- the end of things

    def test_deadline_of_zero(self, pair: Pair) -> None:
        before = pair.mine.copy()
        with pytest.raises(DeadlineExceededError):
            pair.read([0], [0], [SIZE], deadline_s=0)
        assert (pair.mine == before).all()
        pair.read([0], [0], [SIZE])

    def test_cancelled_batch_leaves_memory_alone(self, pair: Pair) -> None:
        local, remote = pair.place([0], [0])
        batch = pair.here.submit(pair.peer, Opcode.READ, local, remote, [SIZE], deadline_s=20)
        batch.cancel()
        status = batch.wait(20)
        assert status in (BatchStatus.CANCELLED, BatchStatus.DONE)
        pair.mine[:] = 3
        pair.theirs[:] = 4
        pair.here.unregister(pair.my_region, 10)
        assert (pair.mine == 3).all()

    def test_peer_that_closed(self, pair: Pair) -> None:
        pair.read([0], [0], [10])
        pair.there.close()
        with pytest.raises(PeerClosedError):
            pair.read([0], [0], [10], deadline_s=10)

    def test_reopened_after_restart(self, pair: Pair) -> None:
        pair.there.close()
        with self.make(listen=f"tcp://{pair.there.address}") as again:
            region = again.register(np.full(100, 5, np.uint8))
            with pytest.raises(PeerClosedError):
                pair.here.read(pair.peer, [pair.my_region.offset], [region.offset], [10], deadline_s=10)
            peer = pair.here.open(again.address, timeout_s=10)
            pair.here.read(peer, [pair.my_region.offset], [region.offset], [100], deadline_s=10)
        assert (pair.mine[:100] == 5).all()

    def test_closed_here(self, pair: Pair) -> None:
        pair.peer.close()
        with pytest.raises(ClosedError):
            pair.read([0], [0], [10])
        pair.here.close()
        with pytest.raises(ClosedError):
            pair.here.open(pair.there.address, timeout_s=1)

    # -- several at once

    def test_many_batches_at_once(self, pair: Pair) -> None:
        size = SIZE // 64
        batches = [
            pair.here.submit(pair.peer, Opcode.READ, *pair.place([i * size], [i * size]), [size], deadline_s=20)
            for i in range(64)
        ]
        assert {batch.wait(20) for batch in batches} == {BatchStatus.DONE}
        assert (pair.mine == pair.theirs).all()

    def test_two_threads_on_one_engine(self, pair: Pair) -> None:
        half = SIZE // 2
        failures: list[BaseException] = []

        def work(start: int) -> None:
            try:
                for at in range(start, start + half, 65536):
                    pair.read([at], [at], [65536])
            except BaseException as error:  # noqa: BLE001 - shown by the assertion below
                failures.append(error)

        threads = [threading.Thread(target=work, args=(start,)) for start in (0, half)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not failures
        assert (pair.mine == pair.theirs).all()

    def test_nothing_is_left_pending(self, pair: Pair) -> None:
        pair.read([0], [0], [SIZE])
        wait_until(lambda: pair.here.metrics()["batches_pending"] == 0, "no batch pending")
        pair.here.unregister(pair.my_region, 5)
        pair.there.unregister(pair.their_region, 5)
        assert pair.here.metrics()["registered_bytes"] == 0
