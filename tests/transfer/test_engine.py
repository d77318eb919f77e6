"""The engine's own behaviour: settings, life and death, roles, checksums."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from mooncake_plugins.errors import (
    AuthenticationError,
    ClosedError,
    ConfigError,
    IntegrityError,
    LocalUsageError,
    PeerClosedError,
)
from mooncake_plugins.testing import LeakSnapshot, leak_check, wait_until
from mooncake_plugins.transfer import BatchStatus, EngineOptions, Integrity, Opcode, TransferEngine
from mooncake_plugins.transports import Capability, _checksums, _vectored
from mooncake_plugins.transports.loopback import LoopbackTransport
from mooncake_plugins.wire import Channel

__all__ = ["leak_check"]


class Note(msgspec.Struct):
    text: str


class Key:
    def __init__(self, key: bytes) -> None:
        self.key = key


def make(**options: Any) -> TransferEngine:
    return TransferEngine(EngineOptions(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"listen": "udp://127.0.0.1:0"},
        {"listen": "tcp://127.0.0.1"},
        {"listen": "tcp://0.0.0.0:0"},
        {"listen": "tcp://0.0.0.0:0", "advertise": "10.0.0.1:5"},
        {"listen": "tcp://203.0.113.9:0", "secret": Key(b"k" * 16)},
        {"advertise": "nonsense"},
        {"transports": ()},
        {"transports": ("tcp", "tcp")},
        {"transports": ("carrier-pigeon",)},
        {"metadata": "nobody"},
        {"connections_per_peer": 0},
        {"slice_bytes": -1},
        {"quarantine_limit_bytes": -1},
        {"segment": "x" * 300},
    ],
)
def test_settings_that_cannot_be_used(leak_check: None, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make(**options)


def test_the_secret_is_not_shown() -> None:
    assert "hush" not in repr(EngineOptions(secret=Key(b"hush hush hush hush")))


def test_secrets_must_agree(leak_check: None) -> None:
    with make(secret=Key(b"a" * 16)) as one, make(secret=Key(b"b" * 16)) as other, make() as third:
        for engine, target in ((one, other), (third, one), (one, third)):
            with pytest.raises(AuthenticationError):
                engine.open(target.address, timeout_s=10)
    with make(secret=Key(b"a" * 16)) as one, make(secret=Key(b"a" * 16)) as other:
        one.open(other.address, timeout_s=10)


def test_same_process_is_preferred_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mooncake_plugins.transfer")
    with make() as one, make() as other:
        for _ in range(3):
            peer = one.open(other.address, timeout_s=10)
        assert (peer.path.transport, peer.path.reason) == ("loopback", "same process")
        assert peer.path.others[0][0] == "tcp"
    assert sum("transport=loopback" in record.getMessage() for record in caplog.records) == 1


def test_no_transport_in_common() -> None:
    with (
        make(transports=("loopback",)) as one,
        make(transports=("tcp",)) as other,
        pytest.raises(PeerClosedError, match="loopback: the peer is not in this process"),
    ):
        one.open(other.address, timeout_s=10)


@pytest.mark.parametrize(
    ("local", "remote", "lengths"),
    [([], [], []), ([0], [0], [0]), ([0, 0], [0], [1]), ([0], [0], [-1]), ([0.5], [0], [1]), ([[0]], [0], [1])],
)
def test_batches_that_make_no_sense(local: Any, remote: Any, lengths: Any) -> None:
    with make() as one, make() as other:
        one.register(bytearray(10))
        peer = one.open(other.address, timeout_s=10)
        with pytest.raises(LocalUsageError):
            one.submit(peer, Opcode.READ, local, remote, lengths, deadline_s=1)
        assert one.metrics()["batches_submitted"] == 0


def test_read_needs_no_grant_and_write_does() -> None:
    with make() as one, make() as other:
        region = one.register(bytearray(10))
        peer = one.open(other.address, timeout_s=10)
        with pytest.raises(LocalUsageError, match="takes no grant"):
            one.submit(peer, Opcode.READ, [region.offset], [0], [1], deadline_s=1, grant=bytes(32))
        for token in (None, b"short"):
            with pytest.raises(LocalUsageError, match="needs the token"):
                one.submit(peer, Opcode.WRITE, [region.offset], [0], [1], deadline_s=1, grant=token)


def test_what_the_transport_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopbackTransport, "capabilities", frozenset({Capability.READ}))
    with make() as one, make() as other:
        here, there = one.register(bytearray(8)), other.register(bytearray(8))
        peer = one.open(other.address, timeout_s=10)
        one.read(peer, [here.offset], [there.offset], [8], deadline_s=10)
        with pytest.raises(LocalUsageError, match="does not offer: integrity"):
            one.read(peer, [here.offset], [there.offset], [8], deadline_s=10, integrity=Integrity.XXH3_64)
        with pytest.raises(LocalUsageError, match="does not offer: write"):
            one.write(peer, [here.offset], [there.offset], [8], deadline_s=10, grant=bytes(32))


def test_close_lets_batches_finish(leak_check: None) -> None:
    with make(transports=("tcp",)) as other:
        one = make(transports=("tcp",))
        source = np.random.default_rng(1).integers(0, 256, 16 << 20, np.uint8)
        memory = np.zeros_like(source)
        mine, theirs = one.register(memory), other.register(source)
        peer = one.open(other.address, timeout_s=10)
        batch = one.submit(peer, Opcode.READ, [mine.offset], [theirs.offset], [source.size], deadline_s=30)
        one.close(30)
        assert batch.wait(0) is BatchStatus.DONE
        assert (memory == source).all()


def test_everything_after_close_is_refused(leak_check: None) -> None:
    engine = make()
    engine.close()
    engine.close()
    engine.abort()
    calls: list[Callable[[], object]] = [
        lambda: engine.register(bytearray(1)),
        lambda: engine.open("127.0.0.1:1", timeout_s=1),
        lambda: engine.grant([0], [1], deadline_s=1),
        lambda: engine.connect("127.0.0.1:1", "x", message_type=Note, timeout_s=1),
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()


def test_two_hundred_engines_leave_nothing() -> None:
    gc.collect()
    before = LeakSnapshot.take()
    with make(transports=("tcp",)) as hub:
        region = hub.register(np.arange(256, dtype=np.uint8))
        for _ in range(200):
            with make(transports=("tcp",)) as engine:
                mine = engine.register(bytearray(256))
                engine.read(
                    engine.open(hub.address, timeout_s=10), [mine.offset], [region.offset], [256], deadline_s=10
                )
        wait_until(lambda: hub.metrics()["connections_in"] == 0, "connections of closed engines to be gone")
    wait_until(lambda: not before.leaks_since(), "threads and descriptors to be given back")


def test_connections_to_dead_peers_do_not_pile_up(leak_check: None) -> None:
    with make(transports=("tcp",)) as engine:
        mine = engine.register(bytearray(8))
        for _ in range(20):
            with make(transports=("tcp",)) as other:
                region = other.register(bytearray(8))
                peer = engine.open(other.address, timeout_s=10)
                engine.read(peer, [mine.offset], [region.offset], [8], deadline_s=10)
        del peer
        gc.collect()
        with make(transports=("tcp",)) as other:
            engine.open(other.address, timeout_s=10)
            assert engine.metrics()["connections_out"] <= 1
            assert engine.metrics()["peers"] <= 2


def test_pool_is_bounded_and_used_again(leak_check: None) -> None:
    with make(transports=("tcp",), connections_per_peer=2) as one, make(transports=("tcp",)) as other:
        mine, theirs = one.register(bytearray(1 << 20)), other.register(bytearray(1 << 20))
        peer = one.open(other.address, timeout_s=10)
        batches = [
            one.submit(peer, Opcode.READ, [mine.offset + i], [theirs.offset], [1], deadline_s=20) for i in range(200)
        ]
        assert {batch.wait(20) for batch in batches} == {BatchStatus.DONE}
        assert one.metrics()["connects"] <= 2
        assert sum(thread.name.startswith("mooncake-mover") for thread in threading.enumerate()) <= 2


def test_idle_movers_end(leak_check: None) -> None:
    with make(transports=("tcp",), idle_timeout_s=0.05) as one, make(transports=("tcp",)) as other:
        mine, theirs = one.register(bytearray(8)), other.register(bytearray(8))
        peer = one.open(other.address, timeout_s=10)
        for _ in range(2):
            batch = one.submit(peer, Opcode.READ, [mine.offset], [theirs.offset], [8], deadline_s=20)
            assert batch.wait(20) is BatchStatus.DONE
            wait_until(lambda: one.metrics()["connections_out"] == 0, "the idle connection to be closed")


# -- roles


def test_a_role_of_the_callers_own(leak_check: None) -> None:
    seen: list[str] = []

    def serve(channel: Channel) -> None:
        seen.append(channel.peer.segment)
        channel.send(Note(channel.recv(timeout_s=10).text.upper()), timeout_s=10)

    with make(segment="server") as server, make(segment="client") as client:
        server.add_role("shout", serve, message_type=Note)
        with client.connect(server.address, "shout", message_type=Note, timeout_s=10) as channel:
            channel.send(Note("hello"), timeout_s=10)
            assert channel.recv(timeout_s=10) == Note("HELLO")
            assert channel.peer.incarnation == server.incarnation
            with pytest.raises(PeerClosedError):
                channel.recv(timeout_s=10)
        for taken in ("shout", "transfer", "metadata"):
            with pytest.raises(ConfigError):
                server.add_role(taken, serve, message_type=Note)
    assert seen == ["client"]


def test_close_ends_channels_on_both_sides(leak_check: None) -> None:
    ended = threading.Event()

    def serve(channel: Channel) -> None:
        try:
            channel.recv(timeout_s=60)
        finally:
            ended.set()

    with make() as server, make() as client:
        server.add_role("wait", serve, message_type=Note)
        channel = client.connect(server.address, "wait", message_type=Note, timeout_s=10)
        client.close()
        assert ended.wait(10)
        with pytest.raises(PeerClosedError):
            channel.recv(timeout_s=1)


# -- checksums


@pytest.mark.parametrize("opcode", [Opcode.READ, Opcode.WRITE])
def test_a_flipped_byte_is_found_and_its_entry_named(opcode: Opcode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The damage is done in the receiver, after the bytes came off the socket."""
    original = _vectored.Vector.recv

    def flipping(self: _vectored.Vector, fd: int, flags: int, limit: int) -> int:
        moved = original(self, fd, flags, limit)
        victim[70_000] = 255 - victim[70_000] if not flipped else victim[70_000]
        flipped.append(moved)
        return moved

    flipped: list[int] = []
    with make(transports=("tcp",)) as one, make(transports=("tcp",)) as other:
        mine, theirs = np.zeros(200_000, np.uint8), np.zeros(200_000, np.uint8)
        victim = mine if opcode is Opcode.READ else theirs
        here, there = one.register(mine), other.register(theirs)
        peer = one.open(other.address, timeout_s=10)
        entries = np.arange(10) * 20_000
        token = other.grant([there.offset], [200_000], deadline_s=60).token if opcode is Opcode.WRITE else None
        monkeypatch.setattr(_vectored.Vector, "recv", flipping)
        batch = one.submit(
            peer,
            opcode,
            here.offset + entries,
            there.offset + entries[::-1],
            np.full(10, 20_000),
            deadline_s=20,
            grant=token,
            integrity=Integrity.XXH3_64,
        )
        assert batch.wait(20) is BatchStatus.FAILED
        assert isinstance(batch.error, IntegrityError)
        assert batch.error.indexes == ((3,) if opcode is Opcode.READ else (6,))
        assert one.metrics()["integrity_failures"] == 1


def test_without_checksums_the_flipped_byte_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    original = _vectored.Vector.recv

    def flipping(self: _vectored.Vector, fd: int, flags: int, limit: int) -> int:
        moved = original(self, fd, flags, limit)
        mine[7] = 99
        return moved

    monkeypatch.setattr(_vectored.Vector, "recv", flipping)
    with make(transports=("tcp",)) as one, make(transports=("tcp",)) as other:
        mine = np.zeros(100, np.uint8)
        here, there = one.register(mine), other.register(np.zeros(100, np.uint8))
        one.read(one.open(other.address, timeout_s=10), [here.offset], [there.offset], [100], deadline_s=10)
        assert mine[7] == 99


def test_right_bytes_in_the_wrong_place_do_not_pass() -> None:
    memory = np.full(2000, 7, np.uint8)
    places = np.array([memory.ctypes.data, memory.ctypes.data + 1000], np.int64)
    lengths = np.array([1000, 1000], np.int64)
    right = _checksums.Pieces("a" * 32, places, np.array([0, 1000], np.int64), lengths)
    swapped = _checksums.Pieces("a" * 32, places, np.array([1000, 0], np.int64), lengths)
    other_segment = _checksums.Pieces("b" * 32, places, np.array([0, 1000], np.int64), lengths)
    for pieces in (right, swapped, other_segment):
        pieces.advance(2000)
    assert right.mismatches(right.to_bytes()) == ()
    assert right.mismatches(swapped.to_bytes()) == (0, 1)
    assert right.mismatches(other_segment.to_bytes()) == (0, 1)


def test_integrity_as_default_of_the_engine() -> None:
    with make(transports=("tcp",), integrity=Integrity.XXH3_64) as one, make(transports=("tcp",)) as other:
        source = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8)
        memory = np.zeros_like(source)
        here, there = one.register(memory), other.register(source)
        one.read(one.open(other.address, timeout_s=10), [here.offset], [there.offset], [source.size], deadline_s=20)
        assert (memory == source).all()


def test_file_descriptors_are_not_inherited() -> None:
    with make() as engine:
        inheritable = [fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_inheritable_socket(fd)]
        assert engine.address and not inheritable


def _is_inheritable_socket(fd: int) -> bool:
    try:
        return os.get_inheritable(fd) and os.readlink(f"/proc/self/fd/{fd}").startswith(("socket:", "anon_inode"))
    except OSError:
        return False
