"""The handshake without sockets."""

from __future__ import annotations

import msgspec
import pytest

from mooncake_plugins.errors import AuthenticationError, FrameError, HandshakeError, MooncakeError, VersionError
from mooncake_plugins.wire import (
    Agreed,
    ClientHandshake,
    Frame,
    FrameDecoder,
    FrameKind,
    Identity,
    ServerHandshake,
    Versions,
    new_incarnation,
    new_nonce,
)
from mooncake_plugins.wire._handshake import decode_refusal, encode_refusal

ALICE = Identity("alice", new_incarnation(), "10.0.0.1:1")
BOB = Identity("bob", new_incarnation(), "10.0.0.2:2")
ROLES = frozenset({"transfer", "metadata"})
N = Versions(2, 1)


def frame_of(data: bytes) -> Frame:
    decoder = FrameDecoder()
    decoder.feed(data)
    frame = decoder.next_frame()
    assert frame is not None and not decoder.is_mid_frame
    return frame


def client(key: bytes = b"k" * 16, role: str = "transfer", versions: Versions = N) -> ClientHandshake:
    return ClientHandshake(ALICE, role, key, new_nonce(), versions)


def server(key: bytes = b"k" * 16, versions: Versions = N) -> ServerHandshake:
    return ServerHandshake(BOB, ROLES, key, new_nonce(), versions)


def shake(one: ClientHandshake, other: ServerHandshake) -> tuple[Agreed | None, Agreed | None]:
    challenge = other.receive(frame_of(one.start()))
    proof = one.receive(frame_of(challenge.send))
    welcome = other.receive(frame_of(proof.send))
    return one.receive(frame_of(welcome.send)).agreed, welcome.agreed


def test_both_learn_who_the_other_is() -> None:
    at_client, at_server = shake(client(), server())
    assert at_client == Agreed("transfer", 2, BOB)
    assert at_server == Agreed("transfer", 2, ALICE)


def test_without_a_secret_both_keys_are_empty() -> None:
    assert shake(client(b""), server(b""))[0] is not None


@pytest.mark.parametrize(("mine", "theirs"), [(b"k" * 16, b"x" * 16), (b"k" * 16, b""), (b"", b"k" * 16)])
def test_wrong_secret_is_refused_by_the_client_first(mine: bytes, theirs: bytes) -> None:
    one, other = client(mine), server(theirs)
    challenge = other.receive(frame_of(one.start()))
    with pytest.raises(AuthenticationError):
        one.receive(frame_of(challenge.send))


def test_server_refuses_a_client_without_the_secret() -> None:
    other = server()
    other.receive(frame_of(client().start()))
    with pytest.raises(AuthenticationError):
        other.receive(Frame(FrameKind.PROOF, bytes(32)))


def test_the_servers_proof_is_not_the_clients() -> None:
    other = server()
    challenge = other.receive(frame_of(client().start()))
    reflected = msgspec.msgpack.decode(frame_of(challenge.send).payload)[-1]
    with pytest.raises(AuthenticationError):
        other.receive(Frame(FrameKind.PROOF, reflected))


def test_a_recorded_proof_does_not_work_twice() -> None:
    one, first, second = client(), server(), server()
    hello = frame_of(one.start())
    proof = one.receive(frame_of(first.receive(hello).send)).send
    second.receive(hello)
    with pytest.raises(AuthenticationError):
        second.receive(frame_of(proof))


@pytest.mark.parametrize("field", range(7))
def test_whatever_is_changed_in_hello_is_noticed(field: int) -> None:
    one, other = client(), server()
    hello = msgspec.msgpack.decode(frame_of(one.start()).payload)
    changed = {0: "metadata", 1: 3, 2: 0, 3: "eve", 4: "0" * 32, 5: "10.6.6.6:6", 6: bytes(32)}
    hello[field] = changed[field]
    challenge = other.receive(Frame(FrameKind.HELLO, msgspec.msgpack.encode(hello)))
    with pytest.raises(AuthenticationError):
        one.receive(frame_of(challenge.send))


@pytest.mark.parametrize("field", [1, 2, 3, 4])
def test_whatever_is_changed_in_challenge_is_noticed(field: int) -> None:
    one, other = client(), server()
    challenge = msgspec.msgpack.decode(frame_of(other.receive(frame_of(one.start())).send).payload)
    challenge[field] = {1: "eve", 2: "0" * 32, 3: "10.6.6.6:6", 4: bytes(32)}[field]
    with pytest.raises(AuthenticationError):
        one.receive(Frame(FrameKind.CHALLENGE, msgspec.msgpack.encode(challenge)))


@pytest.mark.parametrize(
    ("mine", "theirs", "agreed"),
    [
        (Versions(2, 1), Versions(2, 1), 2),
        (Versions(2, 1), Versions(3, 2), 2),
        (Versions(3, 2), Versions(2, 1), 2),
        (Versions(1, 0), Versions(2, 1), 1),
    ],
)
def test_neighbouring_versions_agree(mine: Versions, theirs: Versions, agreed: int) -> None:
    found, _ = shake(client(versions=mine), server(versions=theirs))
    assert found is not None and found.version == agreed


@pytest.mark.parametrize(("mine", "theirs"), [(Versions(4, 3), Versions(2, 1)), (Versions(1, 0), Versions(3, 2))])
def test_distant_versions_do_not(mine: Versions, theirs: Versions) -> None:
    with pytest.raises(VersionError, match="speaks versions"):
        server(versions=theirs).receive(frame_of(client(versions=mine).start()))


def test_unknown_role_is_told_only_to_members() -> None:
    one, other = client(role="nonsense"), server()
    proof = one.receive(frame_of(other.receive(frame_of(one.start())).send))
    with pytest.raises(HandshakeError, match="known: metadata, transfer"):
        other.receive(frame_of(proof.send))


def test_frames_out_of_order() -> None:
    with pytest.raises(HandshakeError, match="PROOF came"):
        server().receive(Frame(FrameKind.PROOF, bytes(32)))
    one = client()
    one.start()
    with pytest.raises(HandshakeError, match="WELCOME came"):
        one.receive(Frame(FrameKind.WELCOME, b""))


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x90", b"\x91" * 3000, msgspec.msgpack.encode([1] * 7)])
def test_undecodable_hello(payload: bytes) -> None:
    with pytest.raises(FrameError):
        server().receive(Frame(FrameKind.HELLO, payload))


@pytest.mark.parametrize("error", [AuthenticationError("a"), VersionError("b"), FrameError("c"), HandshakeError("d")])
def test_a_refusal_arrives_as_the_same_error(error: MooncakeError) -> None:
    one = client()
    one.start()
    with pytest.raises(type(error), match=str(error)):
        one.receive(frame_of(encode_refusal(error)))
    assert type(decode_refusal(frame_of(encode_refusal(error)))) is type(error)
