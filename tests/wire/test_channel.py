"""Channels over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from mooncake_plugins.errors import DeadlineExceededError, FrameError, PeerClosedError
from mooncake_plugins.testing import leak_check
from mooncake_plugins.wire import Agreed, Channel, FrameKind, Identity, Stream, encode_frame, encode_header

__all__ = ["leak_check"]


class Ping(msgspec.Struct, tag="ping"):
    number: int


class Text(msgspec.Struct, tag="text"):
    text: str


AGREED = Agreed("test", 1, Identity("other", "f" * 32, "127.0.0.1:9"))
LIMIT = 100_000


@pytest.fixture
def ends(leak_check: None) -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the raw socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        raw = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    with raw, Channel(Stream(accepted), AGREED, Ping | Text, limit_bytes=LIMIT) as channel:
        raw.settimeout(10)
        yield channel, raw


def message(value: Any) -> bytes:
    return encode_frame(FrameKind.MESSAGE, msgspec.msgpack.encode(value))


def test_typed_messages(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    raw.sendall(message(Ping(1)) + message(Text("two")) + message(Ping(3)))
    assert [channel.recv(timeout_s=10) for _ in range(3)] == [Ping(1), Text("two"), Ping(3)]
    channel.send(Ping(4), timeout_s=10)
    assert raw.recv(100) == message(Ping(4))
    assert channel.peer.segment == "other"


def test_deadline_in_the_middle_of_a_frame_loses_nothing(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    data = message(Text("slow"))
    for part in (data[:3], data[3:12]):
        raw.sendall(part)
        with pytest.raises(DeadlineExceededError):
            channel.recv(timeout_s=0.05)
    raw.sendall(data[12:])
    assert channel.recv(timeout_s=10) == Text("slow")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (message(["nonsense"]), "cannot be decoded"),
        (message({"type": "ping"}), "cannot be decoded"),
        (encode_frame(FrameKind.MESSAGE, b"\xc1"), "cannot be decoded"),
        (encode_frame(FrameKind.READ, b""), "READ frame"),
        (encode_header(FrameKind.MESSAGE, LIMIT + 1), "over the limit"),
        (encode_frame(FrameKind.MESSAGE, b"", version=7), "version 7"),
        (b"garbage garbage", "not a mooncake connection"),
    ],
)
def test_nonsense_is_answered_with_a_reason_and_closes(
    ends: tuple[Channel, socket.socket], data: bytes, reason: str
) -> None:
    channel, raw = ends
    raw.sendall(data)
    with pytest.raises(FrameError, match=reason):
        channel.recv(timeout_s=10)
    assert channel.is_closed
    assert reason.encode() in raw.recv(4096)
    with pytest.raises(PeerClosedError):
        channel.recv(timeout_s=1)


def test_the_peers_reason_is_told(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    raw.sendall(encode_frame(FrameKind.ERROR, msgspec.msgpack.encode(["frame", "you spoke nonsense"])))
    with pytest.raises(PeerClosedError, match="you spoke nonsense"):
        channel.recv(timeout_s=10)


@pytest.mark.parametrize("part", [0, 5, 9])
def test_peer_leaves_between_or_inside_frames(ends: tuple[Channel, socket.socket], part: int) -> None:
    channel, raw = ends
    raw.sendall(message(Text("cut off"))[:part])
    raw.close()
    with pytest.raises(PeerClosedError, match="in the middle of a frame" if part else "the peer closed$"):
        channel.recv(timeout_s=10)


def test_close_wakes_a_blocked_receiver(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    caught: list[BaseException] = []
    is_waiting = threading.Event()

    def receive() -> None:
        is_waiting.set()
        try:
            channel.recv(timeout_s=60)
        except PeerClosedError as error:
            caught.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    is_waiting.wait(10)
    started = time.monotonic()
    channel.close()
    thread.join(10)
    assert len(caught) == 1 and time.monotonic() - started < 10


def test_send_to_a_peer_that_does_not_read(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    text = Text("x" * (LIMIT - 100))
    with pytest.raises(DeadlineExceededError):
        for _ in range(1000):
            channel.send(text, timeout_s=0.1)
    assert channel.is_closed, "a torn frame must not be followed by another"


def test_too_long_a_message_is_not_sent_and_the_channel_lives(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    with pytest.raises(FrameError):
        channel.send(Text("x" * LIMIT), timeout_s=1)
    channel.send(Ping(1), timeout_s=1)
    assert raw.recv(100) == message(Ping(1))


def test_many_senders_do_not_mix_frames(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends

    def send(letter: str) -> None:
        for _ in range(20):
            channel.send(Text(letter * 5000), timeout_s=30)

    threads = [threading.Thread(target=send, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    size = len(message(Text("a" * 5000)))
    received = b""
    while len(received) < 80 * size:
        received += raw.recv(1 << 20)
    for thread in threads:
        thread.join(10)
    texts = [received[i : i + size] for i in range(0, len(received), size)]
    assert sorted(texts) == sorted(message(Text(c * 5000)) for c in "abcd" for _ in range(20))
