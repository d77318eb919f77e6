"""The handshake as two state machines without sockets.

    client                                   server
    HELLO  role, versions, who, nonce  ->
                                       <-    CHALLENGE  version, who, nonce, proof of the server
    PROOF  proof of the client         ->
                                       <-    WELCOME

Each proof is HMAC-SHA256 under the cluster secret (empty when there is none) over its side's name and a hash of
everything said before, so both nonces, both identities, the role and the version are bound, a proof cannot be
replayed, and the proof of one side is not the proof of the other. Proofs are compared in constant time. The client
does not prove itself to a server that has not; the server dispatches no role before the client has.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import msgspec

from mooncake_plugins.errors import AuthenticationError, FrameError, HandshakeError, MooncakeError, VersionError

from ._frames import HANDSHAKE_LIMIT_BYTES, OLDEST_VERSION, PROTOCOL_VERSION, Frame, FrameKind, encode_frame

NONCE_BYTES = 32
NAME_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is: segment name, incarnation (new for every engine) and the address that peers use."""

    segment: str
    incarnation: str
    address: str = ""


PeerIdentity = Identity


@dataclass(frozen=True, slots=True)
class Versions:
    """The protocol versions that one side speaks."""

    newest: int = PROTOCOL_VERSION
    oldest: int = OLDEST_VERSION


VERSIONS = Versions()


@dataclass(frozen=True, slots=True)
class Agreed:
    """What both sides know after the handshake."""

    role: str
    version: int
    peer: PeerIdentity


@dataclass(frozen=True, slots=True)
class Step:
    """What to do after one frame: send these bytes; ``agreed`` is set once the handshake is over."""

    send: bytes = b""
    agreed: Agreed | None = None


class Hello(msgspec.Struct, array_like=True, forbid_unknown_fields=False):
    role: str
    newest: int
    oldest: int
    segment: str
    incarnation: str
    address: str
    nonce: bytes


class Challenge(msgspec.Struct, array_like=True):
    version: int
    segment: str
    incarnation: str
    address: str
    nonce: bytes
    proof: bytes


class Refusal(msgspec.Struct, array_like=True):
    code: str
    reason: str


class State(Enum):
    """Where a handshake stands."""

    START = "start"
    WAIT_HELLO = "wait for HELLO"
    WAIT_CHALLENGE = "wait for CHALLENGE"
    WAIT_PROOF = "wait for PROOF"
    WAIT_WELCOME = "wait for WELCOME"
    OVER = "over"


EXPECTED = {
    State.WAIT_HELLO: FrameKind.HELLO,
    State.WAIT_CHALLENGE: FrameKind.CHALLENGE,
    State.WAIT_PROOF: FrameKind.PROOF,
    State.WAIT_WELCOME: FrameKind.WELCOME,
}

# The code in an ERROR frame and the error it becomes on the other side.
REFUSALS: dict[str, type[MooncakeError]] = {
    "authentication": AuthenticationError,
    "version": VersionError,
    "frame": FrameError,
    "handshake": HandshakeError,
}

T = TypeVar("T")


def new_incarnation() -> str:
    """Return a fresh random incarnation: 128 bits as 32 hex digits."""
    return secrets.token_hex(16)


def new_nonce() -> bytes:
    """Return a fresh nonce for one handshake."""
    return secrets.token_bytes(NONCE_BYTES)


def encode_refusal(error: MooncakeError) -> bytes:
    """Return the ERROR frame that tells a peer why it is being disconnected."""
    code = next((code for code, kind in REFUSALS.items() if type(error) is kind), "handshake")
    return encode_frame(FrameKind.ERROR, msgspec.msgpack.encode(Refusal(code, str(error)[:1000])))


def decode_refusal(frame: Frame) -> MooncakeError:
    """Return the error that a peer's ERROR frame stands for."""
    refusal = decode(frame, Refusal)
    return REFUSALS.get(refusal.code, HandshakeError)(f"the peer refused: {refusal.reason[:1000]}")


def decode(frame: Frame, kind: type[T]) -> T:
    """Decode a handshake payload; nonsense is a FrameError."""
    try:
        return msgspec.msgpack.decode(frame.payload, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise FrameError(f"{frame.kind.name} cannot be decoded: {error}") from error


def proof(key: bytes, side: bytes, hello: bytes, challenge: Challenge) -> bytes:
    """Return one side's proof over everything that was said."""
    said = msgspec.msgpack.encode((challenge.version, challenge.segment, challenge.incarnation, challenge.address))
    transcript = hashlib.sha256(hashlib.sha256(hello).digest() + challenge.nonce + said).digest()
    return hmac.new(key, b"mooncake handshake " + side + transcript, hashlib.sha256).digest()


def checked_peer(segment: str, incarnation: str, address: str, nonce: bytes) -> PeerIdentity:
    """Check what a peer says about itself."""
    if max(len(segment), len(incarnation), len(address)) > NAME_LIMIT or not incarnation:
        raise HandshakeError("a name in the handshake is empty or too long")
    if len(nonce) != NONCE_BYTES:
        raise HandshakeError(f"the nonce has {len(nonce)} bytes, not {NONCE_BYTES}")
    return Identity(segment, incarnation, address)


class _Handshake:
    """What both sides share: the state, and refusing what does not fit it."""

    def __init__(self, identity: Identity, key: bytes, nonce: bytes, versions: Versions, state: State) -> None:
        self.identity, self.key, self.nonce, self.versions = identity, key, nonce, versions
        self.state = state
        self.hello = b""

    def expect(self, frame: Frame) -> None:
        if frame.kind is FrameKind.ERROR:
            self.state = State.OVER
            raise decode_refusal(frame)
        expected = EXPECTED.get(self.state)
        if frame.kind is not expected:
            raise HandshakeError(f"{frame.kind.name} came while in state {self.state.value!r}")


class ClientHandshake(_Handshake):
    """The side that connects. Call ``start`` once, then ``receive`` for each frame until ``Step.agreed`` is set."""

    def __init__(self, identity: Identity, role: str, key: bytes, nonce: bytes, versions: Versions = VERSIONS) -> None:
        super().__init__(identity, key, nonce, versions, State.START)
        self.role = role
        self._agreed: Agreed | None = None

    def start(self) -> bytes:
        """Return the first bytes to send."""
        me = self.identity
        hello = Hello(
            self.role, self.versions.newest, self.versions.oldest, me.segment, me.incarnation, me.address, self.nonce
        )
        self.hello = msgspec.msgpack.encode(hello)
        self.state = State.WAIT_CHALLENGE
        return encode_frame(FrameKind.HELLO, self.hello, self.versions.oldest, HANDSHAKE_LIMIT_BYTES)

    def receive(self, frame: Frame) -> Step:
        """Take one frame of the server.

        Raises:
            HandshakeError: Or one of its kinds: the peer refused, or is not who it should be.
            FrameError: The frame cannot be decoded.
        """
        self.expect(frame)
        if self.state is State.WAIT_WELCOME:
            self.state = State.OVER
            return Step(agreed=self._agreed)
        challenge = decode(frame, Challenge)
        if not self.versions.oldest <= challenge.version <= self.versions.newest:
            raise VersionError(f"the peer chose version {challenge.version}, which was not offered")
        peer = checked_peer(challenge.segment, challenge.incarnation, challenge.address, challenge.nonce)
        if not hmac.compare_digest(challenge.proof, proof(self.key, b"server", self.hello, challenge)):
            raise AuthenticationError("the peer does not know this side's cluster secret (or has none)")
        self._agreed = Agreed(self.role, challenge.version, peer)
        self.state = State.WAIT_WELCOME
        return Step(encode_frame(FrameKind.PROOF, proof(self.key, b"client", self.hello, challenge), challenge.version))


class ServerHandshake(_Handshake):
    """The side that listens. Call ``receive`` for each frame until ``Step.agreed`` is set."""

    def __init__(
        self, identity: Identity, roles: frozenset[str], key: bytes, nonce: bytes, versions: Versions = VERSIONS
    ) -> None:
        super().__init__(identity, key, nonce, versions, State.WAIT_HELLO)
        self.roles = roles
        self._agreed: Agreed | None = None
        self._challenge: Challenge | None = None

    def receive(self, frame: Frame) -> Step:
        """Take one frame of the client.

        Raises:
            HandshakeError: Or one of its kinds: wrong secret, no common version, unknown role, frame out of order.
            FrameError: The frame cannot be decoded.
        """
        self.expect(frame)
        return self._on_hello(frame) if self.state is State.WAIT_HELLO else self._on_proof(frame)

    def _on_hello(self, frame: Frame) -> Step:
        hello = decode(frame, Hello)
        version = min(hello.newest, self.versions.newest)
        if version < max(hello.oldest, self.versions.oldest):
            mine = f"{self.versions.oldest} to {self.versions.newest}"
            raise VersionError(f"this side speaks versions {mine}, the peer {hello.oldest} to {hello.newest}")
        peer = checked_peer(hello.segment, hello.incarnation, hello.address, hello.nonce)
        self.hello = frame.payload
        self._agreed = Agreed(hello.role, version, peer)
        me = self.identity
        challenge = Challenge(version, me.segment, me.incarnation, me.address, self.nonce, b"")
        challenge.proof = proof(self.key, b"server", self.hello, challenge)
        self._challenge = challenge
        self.state = State.WAIT_PROOF
        return Step(encode_frame(FrameKind.CHALLENGE, msgspec.msgpack.encode(challenge), version))

    def _on_proof(self, frame: Frame) -> Step:
        if self._agreed is None or self._challenge is None:
            raise HandshakeError("PROOF before HELLO")
        if not hmac.compare_digest(frame.payload, proof(self.key, b"client", self.hello, self._challenge)):
            raise AuthenticationError("wrong cluster secret")
        # Only a peer that has proved itself learns which roles exist.
        if self._agreed.role not in self.roles:
            raise HandshakeError(f"no role {self._agreed.role!r} here; known: {', '.join(sorted(self.roles))}")
        self.state = State.OVER
        return Step(encode_frame(FrameKind.WELCOME, b"", self._agreed.version), self._agreed)
