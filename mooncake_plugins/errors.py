"""Every error this project raises, as one tree.

    MooncakeError
    ├── ConfigError                   a setting is wrong; nothing was started
    ├── PluginError
    │   ├── DuplicateProviderError    two plugins offer one name
    │   ├── UnknownProviderError      nobody offers the name
    │   └── ProviderUnavailableError  offered, but what it needs is not installed
    ├── WireError
    │   ├── FrameError                bytes that are no frame of ours
    │   └── HandshakeError            the peer and this side do not agree
    │       ├── AuthenticationError   wrong or missing secret
    │       └── VersionError          no protocol version in common
    ├── TransferError
    │   ├── LocalUsageError           this side's own mistake; nothing was queued
    │   │   ├── OutOfBoundsError      a range outside registered memory
    │   │   └── ClosedError           the engine, peer or region was closed here
    │   ├── PeerClosedError           the peer is gone or was restarted
    │   ├── RejectedError             the peer refused (bounds, rights, grant)
    │   │   └── GrantError            the grant is unknown, expired, revoked or does not cover the write
    │   ├── DeadlineExceededError     the deadline passed
    │   ├── QuarantineFullError       too many bytes may still be written by revoked writers
    │   └── IntegrityError            a checksum did not match
    ├── MetadataError                 a segment cannot be resolved
    ├── HandoffError
    │   ├── TicketError               malformed, forged, expired or re-used
    │   └── FingerprintError          prefill and decode would compute different KV
    ├── StoreError
    ├── LaunchError                   a part cannot be started, or died
    └── ConductorError

Third-party exceptions are mapped where they are caught, with ``raise ... from``. A miss is a return value, never an
error. Attributes carry the facts; ``str()`` is one sentence that a person can act on. ``retryable`` says whether the
same call may succeed later without a change on this side.
"""

from __future__ import annotations

from typing import ClassVar


class MooncakeError(Exception):
    """Root of all errors of this project."""

    retryable: ClassVar[bool] = False


class ConfigError(MooncakeError):
    """A setting has a value that cannot be used."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field}: {value!r} is not usable; {remedy}")


class PluginError(MooncakeError):
    """The plugin system was asked for something it cannot give."""


class DuplicateProviderError(PluginError):
    """Two plugins offer the same name in one hook."""

    def __init__(self, hook: str, name: str, plugins: tuple[str, ...]) -> None:
        self.hook, self.name, self.plugins = hook, name, plugins
        super().__init__(f"{hook}: {name!r} is offered by {' and '.join(plugins)}; disable one of them")


class UnknownProviderError(PluginError):
    """No plugin offers the name."""

    def __init__(self, hook: str, name: str, known: tuple[str, ...]) -> None:
        self.hook, self.name, self.known = hook, name, known
        super().__init__(f"{hook}: nobody offers {name!r}; known: {', '.join(known) or 'none'}")


class ProviderUnavailableError(PluginError):
    """The provider exists, but importing it failed."""

    def __init__(self, hook: str, name: str, reason: str, remedy: str) -> None:
        self.hook, self.name, self.reason, self.remedy = hook, name, reason, remedy
        super().__init__(f"{hook}: {name!r} cannot be loaded: {reason}; {remedy}")


class WireError(MooncakeError):
    """Two processes of ours cannot talk."""


class FrameError(WireError):
    """Received bytes are not a frame: wrong version, too long, cut off or not decodable."""


class HandshakeError(WireError):
    """The connection was refused before any request."""


class AuthenticationError(HandshakeError):
    """One side does not know the cluster secret of the other."""


class VersionError(HandshakeError):
    """The two sides have no protocol version in common."""


class TransferError(MooncakeError):
    """A transfer was not done."""


class LocalUsageError(TransferError):
    """This side asked for something impossible; nothing was queued."""


class OutOfBoundsError(LocalUsageError):
    """A range is not inside registered memory; ``index`` is the first offending entry."""

    def __init__(
        self, side: str, index: int, offset: int, length: int, why: str = "is not inside a registered region"
    ) -> None:
        self.side, self.index, self.offset, self.length = side, index, offset, length
        super().__init__(f"{side} range {index} (offset {offset}, {length} bytes) {why}")


class ClosedError(LocalUsageError):
    """The object was closed on this side."""


class PeerClosedError(TransferError):
    """The peer is gone, or (``was_restarted``) another process answers under its name: open it again."""

    retryable = True

    def __init__(self, message: str, *, was_restarted: bool = False) -> None:
        self.was_restarted = was_restarted
        super().__init__(message)


class RejectedError(TransferError):
    """The peer refused; no byte moved."""


class GrantError(RejectedError):
    """A write named a grant that is unknown, expired, revoked, or does not cover it."""


class DeadlineExceededError(TransferError):
    """The deadline passed first."""

    retryable = True


class QuarantineFullError(TransferError):
    """Revoked grants that are not fenced yet cover so many bytes that no new grant is given."""

    retryable = True


class IntegrityError(TransferError):
    """Received bytes do not match their checksum; ``indexes`` names the entries of the batch, where known."""

    retryable = True

    def __init__(self, message: str, indexes: tuple[int, ...] = ()) -> None:
        self.indexes = indexes
        super().__init__(message)


class MetadataError(MooncakeError):
    """A segment name cannot be resolved to a peer."""


class HandoffError(MooncakeError):
    """The hand-off from prefill to decode cannot be done."""


class TicketError(HandoffError):
    """A hand-off ticket is not valid; ``reason`` is one of malformed, forged, expired, reused."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"ticket {reason}" + (f": {detail}" if detail else ""))


class FingerprintError(HandoffError):
    """Two engines would compute different KV values; names every field that differs, with both values."""

    def __init__(self, differences: dict[str, tuple[object, object]], here: str = "here", there: str = "there") -> None:
        self.differences = differences
        listed = "; ".join(f"{name} is {a!r} {here} and {b!r} {there}" for name, (a, b) in sorted(differences.items()))
        super().__init__(f"KV caches are not interchangeable: {listed}")


class StoreError(MooncakeError):
    """The KVCache store could not do what was asked."""


class LaunchError(MooncakeError):
    """A part of the deployment cannot be started, did not become ready, or died."""


class ConductorError(MooncakeError):
    """The Conductor cannot serve."""
