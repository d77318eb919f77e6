"""The one port of an engine: accepts, shakes hands, and gives each connection to the thread of its role.

Bounds: a fixed number of connections in all, and of connections that have not proved themselves yet; of those the
oldest is dropped when a new one comes, so that silent strangers cannot keep members of the cluster out. Nothing a
peer sends ends the accepting thread.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from mooncake_plugins.errors import ConfigError, FrameError, HandshakeError, MooncakeError, TransferError

from ._handshake import Agreed, Identity, ServerHandshake, Versions, new_nonce
from ._shell import KeyHolder, run_server, say_why, secret_key
from ._stream import Address, Deadline, Stream, parse_listen

log = logging.getLogger(__name__)

Handler = Callable[[Stream, Agreed], None]


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """What a listener tolerates."""

    handshake_timeout_s: float = 5.0
    max_connections: int = 1024
    max_pending: int = 64
    backlog: int = 256


class RoleListener:
    """Listens on one port and dispatches connections by role.

    A handler runs in its own named thread, owns its stream's use but not its descriptor, and ends the connection by
    returning or raising.
    """

    def __init__(self, listen: str, secret: KeyHolder | None, limits: ListenerLimits = ListenerLimits()) -> None:
        wanted = parse_listen(listen)
        if secret is None and not wanted.is_loopback:
            raise ConfigError("listen", listen, "without a secret only loopback may be used; set MOONCAKE_SECRET_FILE")
        self._secret, self._limits = secret, limits
        self._sock = _bind(wanted, listen, limits.backlog)
        self.address = Address(wanted.host, self._sock.getsockname()[1])
        self.versions = Versions()
        self._identity = Identity("", "")
        self._roles: dict[str, Handler] = {}
        self._lock = threading.Lock()
        self._streams: dict[Stream, bool] = {}  # value: the handshake is over
        self._threads: set[threading.Thread] = set()
        self._accept_thread: threading.Thread | None = None
        self._is_closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.counters = {"accepted": 0, "refused_handshakes": 0, "dropped_connections": 0}

    def start(self, identity: Identity) -> None:
        """Begin to accept under this identity."""
        self._identity = identity
        self._accept_thread = threading.Thread(
            target=self._accept_loop, name=f"mooncake-accept-{self.address.port}", daemon=True
        )
        self._accept_thread.start()

    def add_role(self, role: str, handler: Handler) -> None:
        """Serve connections that ask for this role.

        Raises:
            ConfigError: The role is taken.
        """
        with self._lock:
            if role in self._roles:
                raise ConfigError("role", role, "it is already served here; choose another name")
            self._roles[role] = handler

    def remove_role(self, role: str) -> None:
        """Refuse new connections for this role."""
        with self._lock:
            self._roles.pop(role, None)

    @property
    def open_connections(self) -> int:
        """Connections accepted and not closed yet."""
        return len(self._streams)

    def _accept_loop(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._is_closing:
            poll.poll()
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                self._after_accept_error(error)
                continue
            self._take(sock)

    def _after_accept_error(self, error: OSError) -> None:
        if self._is_closing:
            return
        log.warning("accept failed address=%s error=%s", self.address, error)
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            wake = select.poll()  # nothing can be accepted until something is closed: do not spin
            wake.register(self._wake, select.POLLIN)
            wake.poll(100)

    def _take(self, sock: socket.socket) -> None:
        try:
            stream = Stream(sock)
        except OSError:
            sock.close()
            return
        if not self._admit(stream):
            say_why(stream, HandshakeError("too many connections here; try again later"))
            stream.close(reset=False)
            return
        thread = threading.Thread(target=self._serve, args=(stream,), name="mooncake-handshake", daemon=True)
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("no thread for a connection address=%s error=%s", self.address, error)
            with self._lock:
                self._threads.discard(thread)
            self._forget(stream)

    def _admit(self, stream: Stream) -> bool:
        """Note the connection, dropping the oldest unproved one when there are too many of those."""
        with self._lock:
            self.counters["accepted"] += 1
            if self._is_closing or len(self._streams) >= self._limits.max_connections:
                self.counters["dropped_connections"] += 1
                return False
            pending = [known for known, is_proved in self._streams.items() if not is_proved]
            if len(pending) >= self._limits.max_pending:
                self.counters["dropped_connections"] += 1
                pending[0].shutdown()
                del self._streams[pending[0]]  # its thread closes it
            self._streams[stream] = False
            return True

    def _serve(self, stream: Stream) -> None:
        try:
            agreed = self._shake_hands(stream)
            if agreed is not None:
                self._run_handler(stream, agreed)
        finally:
            self._forget(stream)
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _shake_hands(self, stream: Stream) -> Agreed | None:
        with self._lock:
            roles = frozenset(self._roles)
        handshake = ServerHandshake(self._identity, roles, secret_key(self._secret), new_nonce(), self.versions)
        try:
            agreed = run_server(stream, handshake, Deadline(self._limits.handshake_timeout_s))
        except (HandshakeError, FrameError, TransferError) as error:
            self.counters["refused_handshakes"] += 1
            log.info("connection refused address=%s error=%s: %s", self.address, type(error).__name__, error)
            return None
        with self._lock:
            if stream not in self._streams:
                return None
            self._streams[stream] = True
        return agreed

    def _run_handler(self, stream: Stream, agreed: Agreed) -> None:
        threading.current_thread().name = f"mooncake-{agreed.role}-{agreed.peer.segment}"
        with self._lock:
            handler = self._roles.get(agreed.role)
        if handler is None:
            return
        try:
            handler(stream, agreed)
        except MooncakeError as error:
            log.info("connection ended role=%s peer=%s reason=%s", agreed.role, agreed.peer.segment, error)
        except Exception:
            log.exception("handler failed role=%s peer=%s", agreed.role, agreed.peer.segment)

    def _forget(self, stream: Stream) -> None:
        with self._lock:
            self._streams.pop(stream, None)
        stream.close()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop accepting, end every connection and wait for the threads. Idempotent."""
        with self._lock:
            was_closing, self._is_closing = self._is_closing, True
            streams = list(self._streams)
        if was_closing:
            return
        os.eventfd_write(self._wake, 1)
        deadline = Deadline(timeout_s)
        if self._accept_thread is not None:
            self._accept_thread.join(deadline.remaining_s)
        self._sock.close()
        os.close(self._wake)
        with self._lock:
            streams = list(self._streams)
            threads = list(self._threads)
        for stream in streams:
            stream.shutdown()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(deadline.remaining_s)


def _bind(wanted: Address, listen: str, backlog: int) -> socket.socket:
    sock = socket.socket(wanted.family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((wanted.host, wanted.port))
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise ConfigError("listen", listen, f"the port cannot be used: {error}") from error
    sock.setblocking(False)
    return sock
