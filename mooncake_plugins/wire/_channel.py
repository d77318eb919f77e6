"""Typed messages between two processes."""

from __future__ import annotations

import threading
from typing import Any

import msgspec

from mooncake_plugins.errors import DeadlineExceededError, FrameError, MooncakeError, PeerClosedError

from ._frames import FRAME_LIMIT_BYTES, FrameDecoder, FrameKind, encode_frame
from ._handshake import Agreed, PeerIdentity, decode_refusal, encode_refusal
from ._stream import Deadline, Stream

READ_BYTES = 65536


class Channel:
    """Sends and receives msgspec messages over one connection.

    One thread may receive while others send. ``close`` may come from any thread and wakes a blocked ``recv``.
    """

    def __init__(
        self, stream: Stream, agreed: Agreed, message_type: Any, *, limit_bytes: int = FRAME_LIMIT_BYTES
    ) -> None:
        self._stream = stream
        self._agreed = agreed
        self._limit = limit_bytes
        self._frames = FrameDecoder(limit_bytes, agreed.version)
        self._messages: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(message_type)
        self._encoder = msgspec.msgpack.Encoder()
        self._receiving = threading.Lock()
        self._sending = threading.Lock()
        self._is_closed = False

    @property
    def peer(self) -> PeerIdentity:
        """Who is at the other end: segment, incarnation, address."""
        return self._agreed.peer

    @property
    def role(self) -> str:
        """The role agreed on."""
        return self._agreed.role

    @property
    def is_closed(self) -> bool:
        """True once closed on this side, by ``close`` or by an error that makes it unusable."""
        return self._is_closed

    def send(self, message: Any, *, timeout_s: float) -> None:
        """Send one message.

        Raises:
            PeerClosedError: The connection is gone, or was closed here.
            DeadlineExceededError: The peer does not take it; the channel is closed, because the frame may be torn.
            FrameError: The message is over the length limit; nothing was sent.

        Blocking: until the kernel has taken it. Thread-safe.
        """
        data = encode_frame(FrameKind.MESSAGE, self._encoder.encode(message), self._agreed.version, self._limit)
        deadline = Deadline(timeout_s)
        if not self._sending.acquire(timeout=max(0.0, timeout_s)):
            raise DeadlineExceededError("another message is still being sent")
        try:
            self._check_open()
            self._stream.send_all(data, deadline)
        except (PeerClosedError, DeadlineExceededError):
            self._abandon()
            raise
        finally:
            self._sending.release()

    def recv(self, *, timeout_s: float) -> Any:
        """Return the next message.

        Raises:
            DeadlineExceededError: None came; the channel stays usable and nothing is lost.
            PeerClosedError: The peer closed, or the channel was closed here.
            FrameError: The peer sent nonsense; it was told so and the channel is closed.

        Blocking: up to ``timeout_s``. Thread-safe (receivers take turns).
        """
        deadline = Deadline(timeout_s)
        if not self._receiving.acquire(timeout=max(0.0, timeout_s)):
            raise DeadlineExceededError("another thread is receiving")
        try:
            self._check_open()
            return self._next_message(deadline)
        except PeerClosedError:
            self._abandon()
            raise
        except FrameError as error:
            self._say_why(error)
            self._abandon()
            raise
        finally:
            self._receiving.release()

    def _next_message(self, deadline: Deadline) -> Any:
        while True:
            frame = self._frames.next_frame()
            if frame is None:
                self._fill(deadline)
            elif frame.kind is FrameKind.ERROR:
                raise self._peer_error(decode_refusal(frame))
            elif frame.kind is not FrameKind.MESSAGE:
                raise FrameError(f"{frame.kind.name} frame on a message channel")
            else:
                return self._decode(frame.payload)

    def _fill(self, deadline: Deadline) -> None:
        data = self._stream.recv_some(max(READ_BYTES, self._frames.wanted), deadline)
        if not data:
            torn = self._frames.is_mid_frame and not self._is_closed
            raise PeerClosedError("the peer closed in the middle of a frame" if torn else "the peer closed")
        self._frames.feed(data)

    def _decode(self, payload: bytes) -> Any:
        try:
            return self._messages.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            raise FrameError(f"message cannot be decoded: {error}") from error

    def _peer_error(self, error: MooncakeError) -> PeerClosedError:
        return PeerClosedError(str(error))

    def _say_why(self, error: FrameError) -> None:
        if self._sending.acquire(timeout=0.1):
            try:
                self._stream.send_all(encode_refusal(error), Deadline(0.1))
            except (PeerClosedError, DeadlineExceededError):
                pass  # a courtesy only
            finally:
                self._sending.release()

    def _check_open(self) -> None:
        if self._is_closed:
            raise PeerClosedError("the channel was closed on this side")

    def _abandon(self) -> None:
        """Make the channel unusable without closing the descriptor under another thread."""
        self._is_closed = True
        self._stream.shutdown()

    def close(self) -> None:
        """Close the channel, from any thread; a blocked ``recv`` or ``send`` raises PeerClosedError. Idempotent."""
        self._abandon()
        # After the shutdown the calls in progress end by themselves, so these locks are free soon.
        with self._receiving, self._sending:
            self._stream.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
