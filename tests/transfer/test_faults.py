"""What happens when a peer dies, stops or comes back, with two processes and real sockets.

The stopped peers stop themselves at a chosen system call (`stop_after`), so each test hits the moment it is about.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from mooncake_plugins.errors import DeadlineExceededError, PeerClosedError
from mooncake_plugins.testing import PeerProcess, leak_check, wait_until
from mooncake_plugins.transfer import (
    BatchStatus,
    EngineOptions,
    Fence,
    Integrity,
    Opcode,
    TransferEngine,
)

__all__ = ["leak_check"]

SIZE = 32 << 20
OLD, NEW = 1, 2


@pytest.fixture
def engine(leak_check: None) -> Iterator[TransferEngine]:
    with TransferEngine(EngineOptions(transports=("tcp",), connections_per_peer=1)) as engine:
        yield engine


@pytest.fixture
def peer() -> Iterator[PeerProcess]:
    with PeerProcess(transports=["tcp"], connections_per_peer=1) as peer:
        yield peer


def test_read_between_two_processes(engine: TransferEngine, peer: PeerProcess) -> None:
    memory = np.zeros(SIZE, np.uint8)
    region = engine.register(memory)
    remote = peer.ask("register", size=SIZE, fill=0)["offset"]
    peer.ask("pattern", offset=remote, seed=11)
    engine.read(
        engine.open(peer.address, timeout_s=10),
        [region.offset],
        [remote],
        [SIZE],
        deadline_s=30,
        integrity=Integrity.XXH3_64,
    )
    assert (memory == np.random.default_rng(11).integers(0, 256, SIZE, np.uint8)).all()
    assert peer.ask("metrics")["bytes_served_read"] == SIZE


def test_source_killed_mid_read(engine: TransferEngine, peer: PeerProcess) -> None:
    memory = np.zeros(SIZE, np.uint8)
    region = engine.register(memory)
    remote = peer.ask("register", size=SIZE, fill=OLD)["offset"]
    opened = engine.open(peer.address, timeout_s=10)
    peer.ask("stop_after", call="send", nth=1)
    batch = engine.submit(opened, Opcode.READ, [region.offset], [remote], [SIZE], deadline_s=30)
    peer.wait_frozen()
    wait_until(lambda: memory[0] == OLD, "the first bytes")
    assert batch.status is BatchStatus.PENDING
    started = time.monotonic()
    peer.kill()
    assert batch.wait(30) is BatchStatus.FAILED
    assert isinstance(batch.error, PeerClosedError)
    assert time.monotonic() - started < 10, "a dead peer is noticed by the broken connection, not by the deadline"


@pytest.mark.parametrize("way", ["deadline", "cancel", "close peer"])
def test_source_stopped_mid_read_then_resumed(engine: TransferEngine, peer: PeerProcess, way: str) -> None:
    """The initiator gives up and uses its memory again; not one byte changes when the source goes on."""
    memory = np.zeros(SIZE, np.uint8)
    region = engine.register(memory)
    remote = peer.ask("register", size=SIZE, fill=OLD)["offset"]
    opened = engine.open(peer.address, timeout_s=10)
    peer.ask("stop_after", call="send", nth=1)
    deadline_s = 1.0 if way == "deadline" else 60.0
    batch = engine.submit(opened, Opcode.READ, [region.offset], [remote], [SIZE], deadline_s=deadline_s)
    peer.wait_frozen()
    wait_until(lambda: memory[0] == OLD, "the first bytes")
    if way == "cancel":
        batch.cancel()
    elif way == "close peer":
        opened.close()
    assert batch.wait(20) is (BatchStatus.CANCELLED if way == "cancel" else BatchStatus.FAILED)
    if way == "deadline":
        assert isinstance(batch.error, DeadlineExceededError)
    assert 0 < (memory == OLD).sum() < SIZE, "the transfer was to be cut in the middle"
    memory[:] = NEW
    peer.resume()
    peer.ask("metrics")  # it runs again, and has been through its socket's errors
    wait_until(lambda: peer.ask("metrics")["connections_in"] <= 0, "the source to drop the connection")
    assert (memory == NEW).all()
    engine.unregister(region, 5)


def test_read_works_again_after_a_stopped_source(engine: TransferEngine, peer: PeerProcess) -> None:
    memory = np.zeros(SIZE, np.uint8)
    region = engine.register(memory)
    remote = peer.ask("register", size=SIZE, fill=OLD)["offset"]
    opened = engine.open(peer.address, timeout_s=10)
    peer.ask("stop_after", call="send", nth=1)
    with pytest.raises(DeadlineExceededError):
        engine.read(opened, [region.offset], [remote], [SIZE], deadline_s=1)
    peer.resume()
    engine.read(opened, [region.offset], [remote], [SIZE], deadline_s=30)
    assert (memory == OLD).all()


def test_writer_stopped_then_target_revokes_and_refills(engine: TransferEngine, peer: PeerProcess) -> None:
    """After FENCED not one byte changes, although the writer goes on with its batch."""
    memory = np.zeros(SIZE, np.uint8)
    region = engine.register(memory)
    grant = engine.grant([region.offset], [SIZE], deadline_s=120)
    local = peer.ask("register", size=SIZE, fill=OLD)["offset"]
    peer.ask("stop_after", call="send", nth=1)
    peer.begin(
        "transfer",
        opcode="write",
        address=engine.address,
        local=local,
        remote=region.offset,
        length=SIZE,
        deadline_s=60,
        token=grant.token.hex(),
    )
    peer.wait_frozen()
    wait_until(lambda: memory[0] == OLD, "the first bytes")
    assert grant.revoke(10) is Fence.FENCED
    assert 0 < (memory == OLD).sum() < SIZE, "the write was to be cut in the middle"
    memory[:] = NEW
    peer.resume()
    answer = peer.answer()
    assert (answer["status"], answer["error"]) == ("failed", "GrantError")
    assert (memory == NEW).all()
    assert engine.quarantined_bytes == 0
    engine.unregister(region, 5)


def test_target_stopped_then_failed_write_is_not_read_from_source_again(
    engine: TransferEngine, peer: PeerProcess
) -> None:
    """The writer gives up and re-uses its source; the target, resumed, gets none of the new bytes."""
    memory = np.full(SIZE, OLD, np.uint8)
    region = engine.register(memory)
    remote = peer.ask("register", size=SIZE, fill=0)["offset"]
    token = bytes.fromhex(peer.ask("grant", offset=remote, length=SIZE, deadline_s=120)["token"])
    opened = engine.open(peer.address, timeout_s=10)
    peer.ask("stop_after", call="recv", nth=1)
    with pytest.raises(DeadlineExceededError):
        engine.write(opened, [region.offset], [remote], [SIZE], grant=token, deadline_s=1)
    memory[:] = NEW
    peer.resume()
    wait_until(lambda: peer.ask("metrics")["connections_in"] == 0, "the target to drop the connection")
    assert peer.ask("count", offset=remote, value=NEW)["count"] == 0
    landed = peer.ask("count", offset=remote, value=OLD)["count"]
    assert 0 < landed <= 256 << 10, "the reset keeps what lay in the socket from landing"
    assert peer.ask("revoke", token=token.hex(), timeout_s=5)["is_fenced"]


def test_writer_killed(engine: TransferEngine, peer: PeerProcess) -> None:
    memory = np.zeros(SIZE, np.uint8)
    region = engine.register(memory)
    grant = engine.grant([region.offset], [SIZE], deadline_s=120)
    local = peer.ask("register", size=SIZE, fill=OLD)["offset"]
    peer.ask("stop_after", call="send", nth=1)
    peer.begin(
        "transfer",
        opcode="write",
        address=engine.address,
        local=local,
        remote=region.offset,
        length=SIZE,
        deadline_s=60,
        token=grant.token.hex(),
    )
    peer.wait_frozen()
    peer.kill()
    wait_until(lambda: engine.metrics()["connections_in"] == 0, "the connection to end")
    assert grant.revoke(5) is Fence.FENCED
    engine.unregister(region, 5)


def test_region_is_not_unregistered_under_a_reader(engine: TransferEngine, peer: PeerProcess) -> None:
    """The peer stops while it reads from us: `unregister` says so, and works once the peer has left."""
    memory = np.full(SIZE, OLD, np.uint8)
    region = engine.register(memory)
    local = peer.ask("register", size=SIZE, fill=0)["offset"]
    peer.ask("stop_after", call="recv", nth=1)
    peer.begin(
        "transfer",
        opcode="read",
        address=engine.address,
        local=local,
        remote=region.offset,
        length=SIZE,
        deadline_s=60,
    )
    peer.wait_frozen()
    with pytest.raises(DeadlineExceededError):
        engine.unregister(region, 0.2)
    peer.kill()
    engine.unregister(region, 10)


def test_peer_restarted_under_the_same_address(engine: TransferEngine) -> None:
    memory = np.zeros(1000, np.uint8)
    region = engine.register(memory)
    with PeerProcess(transports=["tcp"]) as first:
        remote = first.ask("register", size=1000, fill=OLD)["offset"]
        opened = engine.open(first.address, timeout_s=10)
        engine.read(opened, [region.offset], [remote], [1000], deadline_s=10)
        address = first.address
        first.kill()
    with PeerProcess(transports=["tcp"], listen=f"tcp://{address}") as second:
        assert second.ask("register", size=1000, fill=NEW)["offset"] == remote
        with pytest.raises(PeerClosedError) as caught:
            engine.read(opened, [region.offset], [remote], [1000], deadline_s=10)
        assert caught.value.was_restarted
        assert (memory == OLD).all(), "the old handle must not reach the new process"
        with pytest.raises(PeerClosedError):
            engine.submit(opened, Opcode.READ, [region.offset], [remote], [1000], deadline_s=10)
        again = engine.open(address, timeout_s=10)
        assert again.incarnation != opened.incarnation
        engine.read(again, [region.offset], [remote], [1000], deadline_s=10)
    assert (memory == NEW).all()


def test_engine_aborts_while_the_peer_is_stopped(peer: PeerProcess, leak_check: None) -> None:
    memory = np.zeros(SIZE, np.uint8)
    with TransferEngine(EngineOptions(transports=("tcp",))) as engine:
        region = engine.register(memory)
        remote = peer.ask("register", size=SIZE, fill=OLD)["offset"]
        opened = engine.open(peer.address, timeout_s=10)
        peer.freeze()
        batch = engine.submit(opened, Opcode.READ, [region.offset], [remote], [SIZE], deadline_s=60)
        started = time.monotonic()
        engine.abort()
        assert time.monotonic() - started < 15
        assert batch.wait(0) is BatchStatus.CANCELLED
    memory[:] = NEW
    peer.resume()
    peer.ask("metrics")
    assert (memory == NEW).all()


def test_opening_a_stopped_peer_meets_the_deadline(engine: TransferEngine, peer: PeerProcess) -> None:
    peer.freeze()
    started = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        engine.open(peer.address, timeout_s=0.3)
    assert time.monotonic() - started < 10
    peer.resume()
    engine.open(peer.address, timeout_s=10)
