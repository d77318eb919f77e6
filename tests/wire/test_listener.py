"""The listener with real sockets: strangers, nonsense, silence and floods."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from mooncake_plugins.errors import (
    AuthenticationError,
    ConfigError,
    DeadlineExceededError,
    FrameError,
    HandshakeError,
    PeerClosedError,
    VersionError,
)
from mooncake_plugins.testing import leak_check, wait_until
from mooncake_plugins.wire import (
    Agreed,
    Channel,
    Deadline,
    FrameDecoder,
    FrameKind,
    Identity,
    ListenerLimits,
    RoleListener,
    Stream,
    Versions,
    dial,
    encode_header,
    new_incarnation,
)
from mooncake_plugins.wire._handshake import decode_refusal

__all__ = ["leak_check"]

ME = Identity("me", new_incarnation())


class Key:
    def __init__(self, key: bytes) -> None:
        self.key = key


def echo(stream: Stream, agreed: Agreed) -> None:
    with Channel(stream, agreed, str) as channel:
        while True:
            channel.send(channel.recv(timeout_s=30), timeout_s=10)


MakeListener = Callable[..., RoleListener]


@pytest.fixture
def listen(leak_check: None) -> Iterator[MakeListener]:
    made = []

    def make(secret: Key | None = None, **limits: float) -> RoleListener:
        listener = RoleListener("tcp://127.0.0.1:0", secret, ListenerLimits(**limits))  # type: ignore[arg-type]
        made.append(listener)
        listener.add_role("echo", echo)
        listener.start(Identity("server", new_incarnation(), str(listener.address)))
        return listener

    yield make
    for listener in made:
        listener.close()


def works(listener: RoleListener, secret: Key | None = None) -> bool:
    stream, agreed = dial(str(listener.address), "echo", ME, secret, Deadline(10))
    with Channel(stream, agreed, str) as channel:
        channel.send("still here", timeout_s=10)
        return bool(channel.recv(timeout_s=10) == "still here")


def last_words(sock: socket.socket) -> Exception:
    """The error that the listener sends before it closes."""
    sock.settimeout(10)
    decoder, data = FrameDecoder(), b"x"
    while data:
        data = sock.recv(4096)
        decoder.feed(data)
    frame = decoder.next_frame()
    assert frame is not None and frame.kind is FrameKind.ERROR
    return decode_refusal(frame)


def raw(listener: RoleListener) -> socket.socket:
    return socket.create_connection((listener.address.host, listener.address.port), 10)


def test_echo_in_both_directions(listen: MakeListener) -> None:
    assert works(listen())


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(100_000),
        encode_header(FrameKind.HELLO, 2**32 - 1),
        b"MK\x01\x63" + bytes(4),
    ],
    ids=["http", "zeros", "oversized", "unknown kind"],
)
def test_nonsense_gets_a_reason_and_the_listener_lives(listen: MakeListener, data: bytes) -> None:
    listener = listen()
    with raw(listener) as sock:
        sock.sendall(data)
        assert isinstance(last_words(sock), FrameError)
    wait_until(lambda: listener.counters["refused_handshakes"] == 1, "the refusal to be counted")
    assert works(listener)


def test_half_a_frame_then_silence_meets_the_handshake_deadline(listen: MakeListener) -> None:
    listener = listen(handshake_timeout_s=0.2)
    with raw(listener) as sock:
        sock.sendall(encode_header(FrameKind.HELLO, 100) + b"half")
        sock.settimeout(10)
        assert sock.recv(100) == b""
    assert works(listener)


def test_dribbling_does_not_extend_the_handshake_deadline(listen: MakeListener) -> None:
    listener = listen(handshake_timeout_s=0.5)
    with raw(listener) as sock:
        sock.settimeout(0.02)
        sock.sendall(encode_header(FrameKind.HELLO, 4000))
        for _ in range(500):
            try:
                sock.sendall(b"x")
                if sock.recv(100) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            raise AssertionError("still connected")


def test_leaving_in_the_middle_of_the_handshake(listen: MakeListener) -> None:
    listener = listen()
    with raw(listener) as sock:
        sock.sendall(encode_header(FrameKind.HELLO, 100) + b"half")
    wait_until(lambda: listener.open_connections == 0, "the connection to be forgotten")
    assert works(listener)


@pytest.mark.parametrize("mine", [None, Key(b"another secret.."), Key(b"")])
def test_wrong_secret(listen: MakeListener, mine: Key | None) -> None:
    secret = Key(b"the right secret")
    listener = listen(secret)
    with pytest.raises(AuthenticationError):
        dial(str(listener.address), "echo", ME, mine, Deadline(10))
    assert works(listener, secret)


def test_wrong_version(listen: MakeListener) -> None:
    listener = listen()
    with pytest.raises(VersionError, match="the peer refused"):
        dial(str(listener.address), "echo", ME, None, Deadline(10), versions=Versions(9, 8))
    assert works(listener)


def test_unknown_role(listen: MakeListener) -> None:
    with pytest.raises(HandshakeError, match="no role 'x' here; known: echo"):
        dial(str(listen().address), "x", ME, None, Deadline(10))


def test_another_incarnation_is_not_accepted(listen: MakeListener) -> None:
    with pytest.raises(PeerClosedError) as caught:
        dial(str(listen().address), "echo", ME, None, Deadline(10), incarnation=new_incarnation())
    assert caught.value.was_restarted


def test_flood_of_silent_strangers_does_not_keep_members_out(listen: MakeListener) -> None:
    listener = listen(max_pending=8, handshake_timeout_s=30)
    strangers = [raw(listener) for _ in range(100)]
    try:
        wait_until(lambda: listener.counters["accepted"] == 100, "all to be accepted")
        assert listener.open_connections <= 8
        assert works(listener)
    finally:
        for sock in strangers:
            sock.close()


def test_connections_in_all_are_bounded(listen: MakeListener) -> None:
    listener = listen(max_connections=3)
    held = [dial(str(listener.address), "echo", ME, None, Deadline(10))[0] for _ in range(3)]
    try:
        with pytest.raises((HandshakeError, PeerClosedError)):
            dial(str(listener.address), "echo", ME, None, Deadline(10))
        held.pop().close()
        wait_until(lambda: listener.open_connections == 2, "a place to be free")
        assert works(listener)
    finally:
        for stream in held:
            stream.close()


def test_a_handler_that_fails_ends_only_its_own_connection(listen: MakeListener) -> None:
    listener = listen()

    def fail(stream: Stream, agreed: Agreed) -> None:
        raise RuntimeError("handler failed on purpose")

    listener.add_role("fail", fail)
    stream, _ = dial(str(listener.address), "fail", ME, None, Deadline(10))
    assert stream.recv_some(1, Deadline(10)) == b""
    stream.close()
    assert works(listener)


def test_role_names_are_unique(listen: MakeListener) -> None:
    with pytest.raises(ConfigError, match="already served"):
        listen().add_role("echo", echo)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://10.0.0.1:0", "tcp://[::]:0", "tcp://example.org:0"])
def test_without_a_secret_only_loopback(address: str) -> None:
    with pytest.raises(ConfigError, match="MOONCAKE_SECRET_FILE"):
        RoleListener(address, None)


def test_port_taken_is_a_config_error(listen: MakeListener) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        RoleListener(f"tcp://{listen().address}", None)


@pytest.mark.parametrize(
    "address", ["", "nonsense", "1.2.3.4", "1.2.3.4:x", "http://a:1", "a:99999", "a:0", "tcp://a:1/x"]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        dial(address, "echo", ME, None, Deadline(1))


def test_nobody_listens(listen: MakeListener) -> None:
    listener = listen()
    address = str(listener.address)
    listener.close()
    with pytest.raises(PeerClosedError):
        dial(address, "echo", ME, None, Deadline(5))


def test_a_server_that_is_not_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def answer() -> None:
            sock, _ = stranger.accept()
            with sock:
                sock.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n")
                sock.recv(4096)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(FrameError, match="not a mooncake connection"):
            dial(f"127.0.0.1:{stranger.getsockname()[1]}", "echo", ME, None, Deadline(10))
        thread.join(10)


def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger, pytest.raises(DeadlineExceededError):
        dial(f"127.0.0.1:{stranger.getsockname()[1]}", "echo", ME, None, Deadline(0.2))


def test_close_ends_connections_in_every_state(listen: MakeListener) -> None:
    listener = listen()
    silent = raw(listener)
    stream, _ = dial(str(listener.address), "echo", ME, None, Deadline(10))
    listener.close()
    listener.close()
    assert stream.recv_some(1, Deadline(10)) == b""
    stream.close()
    silent.close()
    assert listener.open_connections == 0
