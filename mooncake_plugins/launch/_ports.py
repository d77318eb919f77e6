"""Finding ports that are free, and saying so clearly when one is not."""

from __future__ import annotations

import contextlib
import errno
import socket

from mooncake_plugins.errors import ConfigError


def free_ports(host: str, count: int, *, avoid: int = 0) -> list[int]:
    """Different TCP ports, none of them ``avoid``, that are free on ``host`` now.

    Another program can still take one before it is used.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(_bound(host, 0)) for _ in range(count + 1)]
        ports = [int(sock.getsockname()[1]) for sock in sockets]
        return [port for port in ports if port != avoid][:count]


def check_port_is_free(host: str, port: int, *, option: str = "--port") -> None:
    """Refuse a port that cannot be listened on.

    Raises:
        ConfigError: It is taken, not allowed, or ``host`` is not an address of this machine.
    """
    try:
        _bound(host, port).close()
    except OSError as error:
        raise ConfigError(option, port, _remedy(error, host)) from error


def _remedy(error: OSError, host: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"another program listens there on {host}; stop it or choose another port (0 picks a free one)"
    if error.errno == errno.EACCES:
        return "this user may not listen there; choose a port above 1023"
    return f"this machine cannot listen on {host!r} ({error.strerror}); check --host"


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for a server
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock
