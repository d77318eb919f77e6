"""Messages of the hand-off between a decode instance (D) and a prefill instance (P).

D opens a channel with role ``handoff`` to a worker of P. Several transfers share it, told apart by ``transfer``, the
ticket's id. D's scheduler sends ``Watch`` to learn when the prefill begins; each worker of D sends ``Attach`` to the
worker of P with its own coordinate and pulls what is announced:

    D                                P
    Attach            ─────────────▶ checks ticket, prompt, fingerprint
                      ◀───────────── Attached (where P's blocks lie) or Refused
                      ◀───────────── Ready span 1      (these layers x blocks are computed)
    READ span 1       ═════════════▶ (Transfer Engine)
    Fetched 1         ─────────────▶ hashes its blocks, then looks whether its lease still holds
                      ◀───────────── Commit 1 (checksums)   only now is the data worth anything
    ...
    Release           ─────────────▶ frees its blocks

``Restarted`` says that P lost its blocks to preemption and begins again; spans of older attempts are void.
``Withdrawn`` says that nothing more will come. Silence is filled with ``Ping`` and ``Pong``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

# Numbers that a peer sends are used in int64 arithmetic; others are nonsense and end the channel.
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
Offset = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]

HANDOFF_ROLE = "handoff"
HANDOFF_VERSION = 1


class Watch(msgspec.Struct, frozen=True, tag="watch", array_like=True):
    """D's scheduler asks to be told when the prefill of a request begins."""

    transfer: str
    ticket: str
    consumer: str
    prompt: bytes
    tokens: Count
    fingerprint: dict[str, str | int]


class Attach(msgspec.Struct, frozen=True, tag="attach", array_like=True):
    """A worker of D asks for the blocks from ``first_block`` on."""

    transfer: str
    ticket: str
    consumer: str
    prompt: bytes
    tokens: Count
    fingerprint: dict[str, str | int]
    coordinate: str
    first_block: Count


class Fetched(msgspec.Struct, frozen=True, tag="fetched", array_like=True):
    """D has read a span out of P's memory."""

    transfer: str
    attempt: Count
    seq: Count


class Release(msgspec.Struct, frozen=True, tag="release", array_like=True):
    """D needs nothing more of this transfer."""

    transfer: str
    reason: str


class Ping(msgspec.Struct, frozen=True, tag="ping", array_like=True):
    """D is alive and asks whether P is."""

    number: int


class Scheduled(msgspec.Struct, frozen=True, tag="scheduled", array_like=True):
    """The first chunk of the prefill runs now."""

    transfer: str


class Attached(msgspec.Struct, frozen=True, tag="attached", array_like=True):
    """Where P's blocks lie in its segment; one entry a layer. See ``CacheLayout``."""

    transfer: str
    attempt: Count
    base: list[Offset]
    stride: list[Count]
    block_bytes: list[Count]
    num_blocks: Count


class Ready(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """Layers ``layer0..layer1`` of the sequence's blocks ``block0..block0+len(block_ids)`` are computed."""

    transfer: str
    attempt: Count
    seq: Count
    layer0: Count
    layer1: Count
    block0: Count
    block_ids: list[Count]


class Commit(msgspec.Struct, frozen=True, tag="commit", array_like=True):
    """P's lease held after the span was read. ``checksums``: uint64[layers * blocks], little endian, layer by layer."""

    transfer: str
    attempt: Count
    seq: Count
    checksums: bytes


class Restarted(msgspec.Struct, frozen=True, tag="restarted", array_like=True):
    """P lost its blocks; spans of attempts below this one are void."""

    transfer: str
    attempt: Count


class Refused(msgspec.Struct, frozen=True, tag="refused", array_like=True):
    """P does not serve this transfer; ``reason`` is a short word, ``detail`` a sentence."""

    transfer: str
    reason: str
    detail: str


class Withdrawn(msgspec.Struct, frozen=True, tag="withdrawn", array_like=True):
    """P gave the blocks up: the request was aborted there, or the lease ran out."""

    transfer: str
    reason: str


class Pong(msgspec.Struct, frozen=True, tag="pong", array_like=True):
    """P is alive."""

    number: int


ToPrefill = Watch | Attach | Fetched | Release | Ping
ToDecode = Scheduled | Attached | Ready | Commit | Restarted | Refused | Withdrawn | Pong
HandoffMessage = ToPrefill | ToDecode
