"""One TCP connection with deadlines, and addresses.

A Stream has one owner that closes it. ``shutdown`` may come from any thread: it makes every call in progress fail
soon, and leaves the file descriptor alone, so that no number is re-used under a thread that still works on it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from mooncake_plugins.errors import ConfigError, DeadlineExceededError, PeerClosedError, TransferError

RESET: Final = struct.pack("ii", 1, 0)
KEEPALIVE_OPTIONS: Final = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


class Deadline:
    """A moment on the monotonic clock."""

    __slots__ = ("at",)

    def __init__(self, timeout_s: float) -> None:
        self.at = time.monotonic() + timeout_s

    @classmethod
    def at_time(cls, moment: float) -> Deadline:
        """A deadline at a moment of ``time.monotonic()``."""
        made = cls.__new__(cls)
        made.at = moment
        return made

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - time.monotonic())

    @property
    def has_passed(self) -> bool:
        """True once the moment is over."""
        return time.monotonic() >= self.at


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True when only this host can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_wildcard(self) -> bool:
        """True for an address that means every interface."""
        return self.host in ("", "0.0.0.0", "::")

    @property
    def family(self) -> socket.AddressFamily:
        """The socket family; names resolve as IPv4."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET


def parse_address(text: str, field: str = "address") -> Address:
    """Parse ``host:port`` or ``[v6]:port``, with or without ``tcp://``.

    Raises:
        ConfigError: It is not an address.
    """
    return _parse(text, field, lowest_port=1)


def parse_listen(text: str) -> Address:
    """Parse a listen address such as ``tcp://127.0.0.1:0``; port 0 lets the system choose."""
    return _parse(text, "listen", lowest_port=0)


def _parse(text: str, field: str, lowest_port: int) -> Address:
    remedy = "give host:port, for example 127.0.0.1:7700"
    try:
        parts = urlsplit(text if "://" in text else f"tcp://{text}")
        port = parts.port
    except ValueError as error:
        raise ConfigError(field, text, remedy) from error
    if parts.scheme != "tcp" or port is None or port < lowest_port or parts.path not in ("", "/"):
        raise ConfigError(field, text, remedy)
    return Address(parts.hostname or "", port)


class Stream:
    """A connected non-blocking socket whose calls take deadlines."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._is_closed = False
        self._was_shut_down = False
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE_OPTIONS:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    @classmethod
    def connect(cls, address: Address, deadline: Deadline) -> Stream:
        """Connect to an address.

        Raises:
            PeerClosedError: Nobody listens there, or the host cannot be reached.
            DeadlineExceededError: No answer in time.
        """
        try:
            sock = socket.create_connection((address.host, address.port), max(1e-3, deadline.remaining_s))
        except TimeoutError as error:
            raise DeadlineExceededError(f"no connection to {address} in time") from error
        except OSError as error:
            raise PeerClosedError(f"cannot connect to {address}: {error}") from error
        return cls(sock)

    @property
    def sock(self) -> socket.socket:
        """The socket itself, for transports that move bulk data on it."""
        return self._sock

    @property
    def was_shut_down(self) -> bool:
        """True after ``shutdown`` or ``close`` on this side."""
        return self._was_shut_down

    def fileno(self) -> int:
        """The file descriptor; only for the owner."""
        return self._sock.fileno()

    def recv_some(self, limit: int, deadline: Deadline) -> bytes:
        """Return 1 to ``limit`` bytes, or b"" when the peer has closed.

        Raises:
            DeadlineExceededError: Nothing came in time; nothing was consumed.
            PeerClosedError: The connection was reset, or shut down here.
        """
        while True:
            try:
                return self._sock.recv(limit)
            except BlockingIOError:
                self.wait(select.POLLIN, deadline)
            except OSError as error:
                raise PeerClosedError(f"connection lost: {error}") from error

    def recv_exactly(self, count: int, deadline: Deadline) -> bytes:
        """Return ``count`` bytes.

        Raises:
            PeerClosedError: The stream ended first.
            DeadlineExceededError: Not all came in time; the stream is torn and must be closed.
        """
        parts = bytearray()
        while len(parts) < count:
            part = self.recv_some(count - len(parts), deadline)
            if not part:
                raise PeerClosedError(f"the peer closed after {len(parts)} of {count} bytes")
            parts += part
        return bytes(parts)

    def send_all(self, data: bytes | memoryview, deadline: Deadline) -> None:
        """Send everything.

        Raises:
            PeerClosedError: The connection is gone.
            DeadlineExceededError: Not all was taken in time; the stream is torn and must be closed.
        """
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                self.wait(select.POLLOUT, deadline)
            except OSError as error:
                raise PeerClosedError(f"connection lost: {error}") from error

    def wait(self, events: int, deadline: Deadline) -> int:
        """Wait until the socket is ready; return the poll events.

        Raises:
            DeadlineExceededError: It did not become ready.
        """
        poll = select.poll()
        poll.register(self._sock, events)
        ready = poll.poll(deadline.remaining_s * 1000)
        if not ready:
            raise DeadlineExceededError("the peer did not answer before the deadline")
        return ready[0][1]

    @property
    def is_quiet(self) -> bool:
        """True when the connection is open and nothing unread lies in it: an idle one that may be used again."""
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLIN | select.POLLRDHUP)
        except (ValueError, OSError):
            return False
        return not poll.poll(0) and not self._was_shut_down

    def drain(self, limit_bytes: int, deadline: Deadline) -> None:
        """Send nothing more and throw away what still comes, so that the peer can read our last words.

        Closing with unread bytes would reset the connection, and the peer might never see them.
        """
        with contextlib.suppress(OSError, TransferError):
            self._sock.shutdown(socket.SHUT_WR)
            while limit_bytes > 0 and (data := self.recv_some(65536, deadline)):
                limit_bytes -= len(data)

    def shutdown(self) -> None:
        """Make every call on this stream fail soon. From any thread; does not block."""
        with self._lock:
            self._was_shut_down = True
            if not self._is_closed:
                with contextlib.suppress(OSError):  # the peer may have been faster
                    self._sock.shutdown(socket.SHUT_RDWR)

    def close(self, *, reset: bool = False) -> None:
        """Close the file descriptor; only by the owner, when nobody uses the stream any more. Idempotent.

        Args:
            reset: Throw away what the kernel has not sent yet and tell the peer that the stream was cut.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = self._was_shut_down = True
            if reset:
                with contextlib.suppress(OSError):
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._sock.close()
