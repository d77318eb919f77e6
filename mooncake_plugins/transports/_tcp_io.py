"""Bulk data on one connection: straight between the socket and registered memory, with deadlines.

The descriptor is in blocking mode, so the kernel moves as much as it can per call; short kernel timeouts bring
control back often enough to notice the deadline. ``Stream.shutdown`` from another thread ends a blocked call at once.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from typing import Final

from mooncake_plugins.errors import DeadlineExceededError, FrameError, PeerClosedError
from mooncake_plugins.wire import HEADER_BYTES, Deadline, FrameKind, Stream, decode_header

from ._checksums import Pieces
from ._types import CHUNK_BYTES
from ._vectored import Vector

SOCKET_BUFFER_BYTES: Final = 256 << 10
CALL_BYTES: Final = 4 << 20
WARM_BYTES: Final = 1 << 20  # hashed together: fits the L2 cache; smaller costs more in system calls than it saves
TICK_S: Final = 0.1
SPIN_S: Final = 50e-6
TIMEVAL = struct.Struct("ll")


class BulkSocket:
    """Wraps the stream of an authenticated connection for bulk data. The thread that uses it is its only user."""

    def __init__(self, stream: Stream, version: int) -> None:
        self.stream = stream
        self.version = version
        self._fd = stream.fileno()
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            stream.sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        os.set_blocking(self._fd, True)  # Python's own calls on the socket still pass MSG_DONTWAIT
        self._tick_s = 0.0
        self._set_tick(TICK_S)

    def _set_tick(self, seconds: float) -> None:
        if seconds == self._tick_s:
            return
        self._tick_s = seconds
        value = TIMEVAL.pack(int(seconds), max(1, int(seconds % 1 * 1e6)))
        self.stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self.stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def _check(self, deadline: Deadline) -> None:
        """Look at the deadline and at an interrupt before each call; shorten the kernel's timeout near the end."""
        if self.stream.was_shut_down:
            raise PeerClosedError("the transfer was interrupted on this side")
        left = deadline.at - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError("the transfer's deadline passed")
        self._set_tick(TICK_S if left > TICK_S else max(0.001, left))

    def send(self, vector: Vector, deadline: Deadline, pieces: Pieces | None = None, skip: int = 0) -> None:
        """Send all of a vector.

        With ``pieces``, hash what comes next just before it is sent; ``skip`` is the prefix.
        """
        while vector.remaining:
            self._check(deadline)
            limit = CALL_BYTES
            if pieces is not None:
                limit = WARM_BYTES
                pieces.advance(vector.done - skip + WARM_BYTES + CHUNK_BYTES)
            try:
                vector.send(self._fd, 0, limit)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _lost(error) from error

    def recv(self, vector: Vector, deadline: Deadline, pieces: Pieces | None = None) -> None:
        """Receive all of a vector into place, hashing pieces while they are warm."""
        limit = CALL_BYTES if pieces is None else WARM_BYTES
        while vector.remaining:
            self._check(deadline)
            try:
                moved = vector.recv(self._fd, socket.MSG_WAITALL, limit)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _lost(error) from error
            if moved == 0:
                raise PeerClosedError(f"the peer closed after {vector.done} of {vector.total} bytes")
            if pieces is not None:
                pieces.advance(vector.done)

    def wait_readable(self, deadline: Deadline) -> None:
        """Wait for bytes. An error or a reset of the connection raises even if unread bytes are left.

        Raises:
            PeerClosedError: The connection is broken.
            DeadlineExceededError: No bytes came.
        """
        if self.stream.was_shut_down:
            raise PeerClosedError("the transfer was interrupted on this side")
        if self.stream.wait(select.POLLIN, deadline) & (select.POLLERR | select.POLLHUP):
            raise PeerClosedError("the peer cut the connection")

    def recv_now(self, vector: Vector, limit: int) -> None:
        """Receive up to ``limit`` bytes that have arrived already; does not block."""
        try:
            moved = vector.recv(self._fd, socket.MSG_DONTWAIT, limit)
        except BlockingIOError:
            return
        except OSError as error:
            raise _lost(error) from error
        if moved == 0:
            raise PeerClosedError(f"the peer closed after {vector.done} of {vector.total} bytes")

    def discard(self, count: int, deadline: Deadline) -> None:
        """Receive bytes and throw them away."""
        while count:
            count -= len(self._recv_some(min(count, CHUNK_BYTES), deadline))

    def recv_bytes(self, count: int, deadline: Deadline) -> bytes:
        """Receive exactly ``count`` bytes."""
        data = self._recv_some(count, deadline)
        while len(data) < count:
            data += self._recv_some(count - len(data), deadline)
        return data

    def _recv_some(self, limit: int, deadline: Deadline) -> bytes:
        while True:
            try:
                data = self.stream.sock.recv(limit, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self.stream.wait(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise _lost(error) from error
            if not data:
                raise PeerClosedError("the peer closed")
            return data

    def spin(self) -> None:
        """Wait a very short while for bytes without sleeping: waking a sleeping core costs more than an answer does."""
        recv, until = self.stream.sock.recv, time.perf_counter() + SPIN_S
        while time.perf_counter() < until:
            try:
                recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                return
            except BlockingIOError:
                continue
            except OSError:
                return  # the next real call reports it

    def recv_frame(self, limit_bytes: int, deadline: Deadline) -> tuple[FrameKind, bytes]:
        """Receive one frame."""
        header = self.recv_bytes(HEADER_BYTES, deadline)
        kind, length, _ = decode_header(header, limit_bytes, self.version)
        return kind, self.recv_bytes(length, deadline) if length else b""

    def send_bytes(self, data: bytes, deadline: Deadline) -> None:
        """Send some bytes."""
        self.stream.send_all(data, deadline)


def _lost(error: OSError) -> PeerClosedError:
    name = errno.errorcode.get(error.errno or 0, "?")
    return PeerClosedError(f"connection lost ({name}: {error.strerror})")


def unexpected(kind: FrameKind) -> FrameError:
    """The error for a frame that does not fit here."""
    return FrameError(f"{kind.name} frame where it does not belong")
