"""Frames without sockets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_plugins.errors import FrameError
from mooncake_plugins.wire import PROTOCOL_VERSION, Frame, FrameDecoder, FrameKind, encode_frame, encode_header


@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(1, 50))
def test_any_cutting_gives_the_same_frames(payloads: list[bytes], step: int) -> None:
    stream = b"".join(encode_frame(FrameKind.MESSAGE, payload) for payload in payloads)
    decoder, found = FrameDecoder(version=PROTOCOL_VERSION), []
    for at in range(0, len(stream), step):
        decoder.feed(stream[at : at + step])
        while (frame := decoder.next_frame()) is not None:
            found.append(frame)
    assert found == [Frame(FrameKind.MESSAGE, payload) for payload in payloads]
    assert not decoder.is_mid_frame


def test_wanted_never_reaches_into_the_next_frame() -> None:
    stream = encode_frame(FrameKind.HELLO, b"abc") + b"what follows"
    decoder, at = FrameDecoder(), 0
    while (frame := decoder.next_frame()) is None:
        step = decoder.wanted
        assert step > 0
        decoder.feed(stream[at : at + step])
        at += step
    assert frame.payload == b"abc"
    assert stream[at:] == b"what follows"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not a mooncake connection"),
        (bytes(64), "not a mooncake connection"),
        (b"MK\x01\xfa\x00\x00\x00\x00", "unknown frame kind 250"),
        (encode_header(FrameKind.MESSAGE, 1001), "1001 bytes is over the limit of 1000"),
        (encode_header(FrameKind.MESSAGE, 2**32 - 1), "over the limit"),
        (encode_header(FrameKind.MESSAGE, 5, PROTOCOL_VERSION + 1), "was agreed"),
    ],
)
def test_nonsense_is_named(data: bytes, reason: str) -> None:
    decoder = FrameDecoder(limit_bytes=1000, version=PROTOCOL_VERSION)
    decoder.feed(data)
    with pytest.raises(FrameError, match=reason):
        decoder.next_frame()


@given(st.binary(min_size=8, max_size=200))
def test_random_bytes_never_do_worse_than_a_frame_error(data: bytes) -> None:
    decoder = FrameDecoder(limit_bytes=100)
    decoder.feed(data)
    try:
        while decoder.next_frame() is not None:
            pass
    except FrameError:
        pass


def test_too_long_a_frame_is_not_sent() -> None:
    with pytest.raises(FrameError):
        encode_frame(FrameKind.MESSAGE, bytes(11), limit_bytes=10)
