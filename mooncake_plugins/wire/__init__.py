"""Frames, handshake and channels: how two processes of ours talk."""

from __future__ import annotations

from ._channel import Channel
from ._frames import (
    FRAME_LIMIT_BYTES,
    HEADER_BYTES,
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    Frame,
    FrameDecoder,
    FrameKind,
    decode_header,
    encode_frame,
    encode_header,
)
from ._handshake import (
    Agreed,
    ClientHandshake,
    Identity,
    PeerIdentity,
    ServerHandshake,
    Versions,
    new_incarnation,
    new_nonce,
)
from ._listener import ListenerLimits, RoleListener
from ._shell import KeyHolder, dial
from ._stream import Address, Deadline, Stream, parse_address, parse_listen

__all__ = [
    "FRAME_LIMIT_BYTES",
    "HEADER_BYTES",
    "OLDEST_VERSION",
    "PROTOCOL_VERSION",
    "Address",
    "Agreed",
    "Channel",
    "ClientHandshake",
    "Deadline",
    "Frame",
    "FrameDecoder",
    "FrameKind",
    "Identity",
    "KeyHolder",
    "ListenerLimits",
    "PeerIdentity",
    "RoleListener",
    "ServerHandshake",
    "Stream",
    "Versions",
    "decode_header",
    "dial",
    "encode_frame",
    "encode_header",
    "new_incarnation",
    "new_nonce",
    "parse_address",
    "parse_listen",
]
