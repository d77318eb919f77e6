"""The initiator side of tcp: one connection, one request at a time."""

from __future__ import annotations

import itertools

import numpy as np

from mooncake_plugins.errors import FrameError, IntegrityError, PeerClosedError, RejectedError
from mooncake_plugins.wire import FrameKind, Stream

from ._checksums import Pieces, piece_count
from ._interface import Endpoint, Work
from ._tcp_io import BulkSocket, unexpected
from ._tcp_protocol import (
    ANSWER_LIMIT_BYTES,
    DATA,
    DONE,
    check_number,
    decode_refusal,
    encode_request,
)
from ._types import Integrity, Opcode
from ._vectored import Vector

_NOTHING = np.empty(0, np.int64)


class TcpEndpoint(Endpoint):
    """Asks for reads and writes on one authenticated connection.

    Any failure that leaves the connection out of step closes it with a reset before ``execute`` raises: the kernel
    then neither sends what was not sent yet, nor lets the target take what it has not read. The thread that receives
    is the one that calls.
    """

    def __init__(self, stream: Stream, version: int, incarnation: str) -> None:
        self._stream = stream
        self._bulk = BulkSocket(stream, version)
        self._incarnation = incarnation
        self._numbers = itertools.count(1)
        self._is_broken = False

    @property
    def is_usable(self) -> bool:
        """True when the connection is in step, open and quiet."""
        return not self._is_broken and self._stream.is_quiet

    def execute(self, work: Work) -> None:
        """Perform one work; see `Endpoint.execute`."""
        if self._is_broken:
            raise PeerClosedError("this connection was closed after an error")
        try:
            self._run(work)
        except (RejectedError, IntegrityError):
            raise
        except BaseException:
            self._break()
            raise

    def _run(self, work: Work) -> None:
        number = next(self._numbers)
        pieces = None
        if work.integrity is not Integrity.NONE:
            pieces = Pieces(self._incarnation, work.addresses, work.remote, work.lengths)
        if work.opcode is Opcode.READ:
            self._read(work, number, pieces)
        else:
            self._write(work, number, pieces)

    def _read(self, work: Work, number: int, pieces: Pieces | None) -> None:
        request = encode_request(FrameKind.READ, number, work, self._bulk.version)
        self._bulk.send_bytes(request, work.deadline)
        kind, payload = self._answer(work, number)
        if kind is not FrameKind.DATA or len(payload) != DATA.size:
            raise unexpected(kind)
        found, total = DATA.unpack(payload)
        check_number(found, number)
        if total != work.total_bytes:
            raise FrameError(f"the peer sends {total} bytes where {work.total_bytes} were asked for")
        self._bulk.recv(Vector(work.addresses, work.lengths), work.deadline, pieces)
        if pieces is not None:
            self._verify(work, pieces)

    def _verify(self, work: Work, pieces: Pieces) -> None:
        theirs = self._bulk.recv_bytes(8 * piece_count(work.lengths), work.deadline)
        damaged = pieces.mismatches(theirs)
        if damaged:
            raise IntegrityError(f"{len(damaged)} ranges arrived damaged", damaged)

    def _write(self, work: Work, number: int, pieces: Pieces | None) -> None:
        request = encode_request(FrameKind.WRITE, number, work, self._bulk.version)
        vector = Vector(work.addresses, work.lengths, prefix=request)
        self._bulk.send(vector, work.deadline, pieces, skip=len(request))
        if pieces is not None:
            pieces.advance(work.total_bytes)
            self._bulk.send_bytes(pieces.to_bytes(), work.deadline)
        kind, payload = self._answer(work, number)
        if kind is not FrameKind.DONE or len(payload) != DONE.size:
            raise unexpected(kind)
        check_number(DONE.unpack(payload)[0], number)

    def _answer(self, work: Work, number: int) -> tuple[FrameKind, bytes]:
        self._bulk.spin()
        kind, payload = self._bulk.recv_frame(ANSWER_LIMIT_BYTES, work.deadline)
        if kind is FrameKind.REFUSED:
            raise decode_refusal(payload, number)
        return kind, payload

    def interrupt(self) -> None:
        """Make an ``execute`` in progress raise soon."""
        self._stream.shutdown()

    def _break(self) -> None:
        self._is_broken = True
        self._stream.close(reset=True)

    def close(self) -> None:
        """Close the connection."""
        self._is_broken = True
        self._stream.close()
