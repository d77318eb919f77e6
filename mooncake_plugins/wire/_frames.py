"""Frames: an 8-byte header and a payload. No sockets here.

    0      2         3      4              8
    | "MK" | version | kind | u32 length   | payload ...

The header never changes. Handshake frames may carry any version byte, because the version is what the handshake
agrees on; from then on every frame carries the agreed one. A side that speaks version N also speaks N-1.

The length limit is checked on the header, before memory for the payload is taken. Bulk data of a transfer follows its
frame and is not counted by the frame's length.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from mooncake_plugins.errors import FrameError

MAGIC = b"MK"
PROTOCOL_VERSION = 1
OLDEST_VERSION = 0
FRAME_LIMIT_BYTES = 4 << 20
HANDSHAKE_LIMIT_BYTES = 4096
HEADER = struct.Struct(">2sBBI")
HEADER_BYTES = HEADER.size


class FrameKind(IntEnum):
    """What a frame is. 32 and above belong to transports that run over our connections."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    ERROR = 5
    MESSAGE = 6
    READ = 32
    WRITE = 33
    DATA = 34
    DONE = 35
    REFUSED = 36


KINDS = frozenset(int(kind) for kind in FrameKind)


@dataclass(frozen=True, slots=True)
class Frame:
    """One received frame."""

    kind: FrameKind
    payload: bytes
    version: int = PROTOCOL_VERSION


def encode_header(kind: FrameKind, length: int, version: int = PROTOCOL_VERSION) -> bytes:
    """Return the header of a frame whose payload has ``length`` bytes."""
    return HEADER.pack(MAGIC, version, kind, length)


def encode_frame(
    kind: FrameKind, payload: bytes, version: int = PROTOCOL_VERSION, limit_bytes: int = FRAME_LIMIT_BYTES
) -> bytes:
    """Return one whole frame.

    Raises:
        FrameError: The payload is longer than the limit, so no peer would take it.
    """
    if len(payload) > limit_bytes:
        raise FrameError(f"a frame of {len(payload)} bytes is over the limit of {limit_bytes}")
    return encode_header(kind, len(payload), version) + payload


def decode_header(data: bytes | bytearray, limit_bytes: int, version: int | None) -> tuple[FrameKind, int, int]:
    """Return (kind, payload length, version) of a header.

    Args:
        data: Exactly ``HEADER.size`` bytes.
        limit_bytes: Longest payload to take.
        version: The agreed version, or None before there is one.

    Raises:
        FrameError: These bytes are no header of ours; the sentence says why.
    """
    magic, found, kind, length = HEADER.unpack(data)
    if magic != MAGIC:
        raise FrameError(f"not a mooncake connection: the first bytes are {bytes(data)!r}")
    if version is not None and found != version:
        raise FrameError(f"frame of protocol version {found} where {version} was agreed")
    if kind not in KINDS:
        raise FrameError(f"unknown frame kind {kind}")
    if length > limit_bytes:
        raise FrameError(f"a frame of {length} bytes is over the limit of {limit_bytes}")
    return FrameKind(kind), length, found


class FrameDecoder:
    """Cuts a byte stream in frames.

    Feed it what arrives, then call ``next_frame`` until it gives None. ``wanted`` says how many bytes are missing for
    the current step, so that a shell can read exactly that much and leave what follows in the socket.
    """

    def __init__(self, limit_bytes: int = FRAME_LIMIT_BYTES, version: int | None = None) -> None:
        self._limit = limit_bytes
        self._version = version
        self._buffer = bytearray()
        self._header: tuple[FrameKind, int, int] | None = None

    @property
    def wanted(self) -> int:
        """Bytes missing before the next step; at least 1 unless a frame is ready."""
        need = HEADER.size if self._header is None else self._header[1]
        return max(0, need - len(self._buffer))

    @property
    def is_mid_frame(self) -> bool:
        """True when the stream must not end here."""
        return bool(self._buffer) or self._header is not None

    def feed(self, data: bytes | memoryview) -> None:
        """Add received bytes."""
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """Return the next whole frame, or None when more bytes are needed.

        Raises:
            FrameError: The bytes are no frame of ours; the stream cannot be used any more.
        """
        if self._header is None:
            if len(self._buffer) < HEADER.size:
                return None
            self._header = decode_header(self._buffer[: HEADER.size], self._limit, self._version)
            del self._buffer[: HEADER.size]
        kind, length, version = self._header
        if len(self._buffer) < length:
            return None
        payload = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._header = None
        return Frame(kind, payload, version)
