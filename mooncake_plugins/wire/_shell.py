"""The handshake performed on a socket."""

from __future__ import annotations

import contextlib
from typing import Protocol

from mooncake_plugins.errors import FrameError, HandshakeError, MooncakeError, PeerClosedError, TransferError

from ._frames import HANDSHAKE_LIMIT_BYTES, Frame, FrameDecoder
from ._handshake import (
    VERSIONS,
    Agreed,
    ClientHandshake,
    Identity,
    ServerHandshake,
    Versions,
    encode_refusal,
    new_nonce,
)
from ._stream import Deadline, Stream, parse_address

DRAIN_BYTES = 1 << 20
DRAIN_S = 0.5


class KeyHolder(Protocol):
    """What carries the cluster secret; `mooncake_plugins.config.Secret` does."""

    @property
    def key(self) -> bytes:
        """The secret's bytes."""
        ...


def secret_key(secret: KeyHolder | None) -> bytes:
    """Return the key for HMAC; empty without a secret."""
    return b"" if secret is None else secret.key


def recv_frame(stream: Stream, decoder: FrameDecoder, deadline: Deadline) -> Frame:
    """Read exactly one frame and not a byte more."""
    while True:
        frame = decoder.next_frame()
        if frame is not None:
            return frame
        data = stream.recv_some(decoder.wanted, deadline)
        if not data:
            where = "in the middle of a frame" if decoder.is_mid_frame else "during the handshake"
            raise PeerClosedError(f"the peer closed {where}")
        decoder.feed(data)


def dial(
    address: str,
    role: str,
    identity: Identity,
    secret: KeyHolder | None,
    deadline: Deadline,
    *,
    incarnation: str | None = None,
    versions: Versions = VERSIONS,
) -> tuple[Stream, Agreed]:
    """Connect to a listener of ours and agree on a role.

    Args:
        address: host:port of the peer.
        role: What the connection is for.
        identity: Who this side is.
        secret: The cluster secret, or None.
        deadline: When to give up.
        incarnation: The only incarnation to accept; None takes any.
        versions: Protocol versions that this side speaks.

    Raises:
        PeerClosedError: Nobody answers, or another incarnation does.
        HandshakeError: Wrong secret, version or role.
        FrameError: What listens there is not ours.
        DeadlineExceededError: No answer in time.
    """
    stream = Stream.connect(parse_address(address), deadline)
    try:
        agreed = run_client(
            stream, ClientHandshake(identity, role, secret_key(secret), new_nonce(), versions), deadline
        )
        if incarnation is not None and agreed.peer.incarnation != incarnation:
            raise PeerClosedError(f"{address} was restarted: open it again", was_restarted=True)
    except BaseException:
        stream.close(reset=True)
        raise
    return stream, agreed


def run_client(stream: Stream, handshake: ClientHandshake, deadline: Deadline) -> Agreed:
    """Perform the connecting side's handshake."""
    decoder = FrameDecoder(HANDSHAKE_LIMIT_BYTES)
    stream.send_all(handshake.start(), deadline)
    while True:
        step = handshake.receive(recv_frame(stream, decoder, deadline))
        if step.send:
            stream.send_all(step.send, deadline)
        if step.agreed is not None:
            return step.agreed


def run_server(stream: Stream, handshake: ServerHandshake, deadline: Deadline) -> Agreed:
    """Perform the listening side's handshake; a peer that speaks nonsense is told why before the error is raised."""
    decoder = FrameDecoder(HANDSHAKE_LIMIT_BYTES)
    try:
        while True:
            step = handshake.receive(recv_frame(stream, decoder, deadline))
            if step.send:
                stream.send_all(step.send, deadline)
            if step.agreed is not None:
                return step.agreed
    except (HandshakeError, FrameError) as error:
        say_why(stream, error)
        stream.drain(DRAIN_BYTES, Deadline(DRAIN_S))
        raise


def say_why(stream: Stream, error: MooncakeError) -> None:
    """Send an ERROR frame if the peer takes it at once."""
    with contextlib.suppress(TransferError):  # a courtesy: the connection is being closed anyway
        stream.send_all(encode_refusal(error), Deadline(0.2))
