"""What the tcp transport says on a connection of role "transfer".

    initiator                                   target
    READ   request, offsets, lengths       ->
                                           <-   DATA    id, bytes; then the bytes, then digests if asked for
    WRITE  request, offsets, lengths;      ->
           then the bytes, then digests    <-   DONE    id
                                           <-   REFUSED id, code, reason, ranges     instead of DATA or DONE

One request is under way per connection. After REFUSED the connection is in step and stays usable.
All integers of requests and answers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from mooncake_plugins.errors import FrameError, GrantError, IntegrityError, RejectedError, TransferError
from mooncake_plugins.wire import FrameKind, encode_header

from ._interface import Work
from ._types import Integrity

Array = npt.NDArray[np.int64]

ROLE = "transfer"
TOKEN_BYTES = 32
REQUEST = struct.Struct(f"<QQIIB7x{TOKEN_BYTES}s")
DATA = struct.Struct("<QQ")
DONE = struct.Struct("<Q")
MAX_RANGES = 32768
REQUEST_LIMIT_BYTES = REQUEST.size + 16 * MAX_RANGES
ANSWER_LIMIT_BYTES = 65536
MAX_TIMEOUT_MS = 0xFFFFFFFF

INTEGRITY_CODES = {Integrity.NONE: 0, Integrity.XXH3_64: 1}
INTEGRITY_OF_CODE = {code: integrity for integrity, code in INTEGRITY_CODES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A READ or WRITE as the target sees it."""

    number: int
    total_bytes: int
    timeout_s: float
    integrity: Integrity
    token: bytes
    offsets: Array
    lengths: Array


class Refusal(msgspec.Struct, array_like=True):
    """Why a request was not done."""

    number: int
    code: str
    reason: str
    ranges: list[int] = []


def encode_request(kind: FrameKind, number: int, work: Work, version: int) -> bytes:
    """Return the frame that asks for a work."""
    timeout_ms = min(MAX_TIMEOUT_MS, int(work.deadline.remaining_s * 1000) + 1)
    head = REQUEST.pack(
        number, work.total_bytes, timeout_ms, len(work.remote), INTEGRITY_CODES[work.integrity], work.token
    )
    body = head + work.remote.astype("<i8", copy=False).tobytes() + work.lengths.astype("<i8", copy=False).tobytes()
    return encode_header(kind, len(body), version) + body


def decode_request(payload: bytes) -> Request:
    """Decode a request.

    Raises:
        FrameError: It is inconsistent; the connection cannot go on, as the length of what follows is unknown.
    """
    if len(payload) < REQUEST.size:
        raise FrameError(f"a request of {len(payload)} bytes is too short")
    number, total, timeout_ms, count, code, token = REQUEST.unpack_from(payload)
    if not 0 < count <= MAX_RANGES or len(payload) != REQUEST.size + 16 * count:
        raise FrameError(f"a request of {len(payload)} bytes does not hold {count} ranges")
    if code not in INTEGRITY_OF_CODE:
        raise FrameError(f"unknown kind of checksum {code}")
    arrays = np.frombuffer(payload, "<i8", offset=REQUEST.size).astype(np.int64, copy=False)
    offsets, lengths = arrays[:count], arrays[count:]
    # Summed as Python integers once they are known to be small, so that no sum can wrap round.
    if lengths.min() <= 0 or lengths.max() > total or int(lengths.sum(dtype=np.float64)) > 1 << 62:
        raise FrameError("a request holds a length that is not possible")
    if int(lengths.sum()) != total:
        raise FrameError(f"a request of {total} bytes has ranges of {int(lengths.sum())} bytes")
    return Request(number, total, timeout_ms / 1000, INTEGRITY_OF_CODE[code], token, offsets, lengths)


def encode_refusal(number: int, error: TransferError, version: int) -> bytes:
    """Return the REFUSED frame for an error."""
    code = "rejected"
    ranges: list[int] = []
    if isinstance(error, GrantError):
        code = "grant"
    elif isinstance(error, IntegrityError):
        code, ranges = "integrity", list(error.indexes[:1024])
    body = msgspec.msgpack.encode(Refusal(number, code, str(error)[:1000], ranges))
    return encode_header(FrameKind.REFUSED, len(body), version) + body


def decode_refusal(payload: bytes, number: int) -> TransferError:
    """Return the error that a REFUSED frame stands for."""
    try:
        refusal = msgspec.msgpack.decode(payload, type=Refusal)
    except msgspec.DecodeError as error:
        raise FrameError(f"REFUSED cannot be decoded: {error}") from error
    check_number(refusal.number, number)
    if refusal.code == "integrity":
        return IntegrityError(f"the peer found damaged bytes: {refusal.reason}", tuple(refusal.ranges))
    kind = GrantError if refusal.code == "grant" else RejectedError
    return kind(f"the peer refused: {refusal.reason}")


def check_number(found: int, expected: int) -> None:
    """An answer must belong to the request under way."""
    if found != expected:
        raise FrameError(f"answer to request {found} where {expected} is under way")
