"""The target side of tcp: serves the requests of one connection, one after the other."""

from __future__ import annotations

import numpy as np

from mooncake_plugins.errors import (
    DeadlineExceededError,
    GrantError,
    IntegrityError,
    PeerClosedError,
    RejectedError,
    TransferError,
)
from mooncake_plugins.wire import Agreed, Deadline, FrameKind, Stream, encode_header

from ._checksums import Pieces, piece_count
from ._interface import TransportHost, WriteAdmission
from ._tcp_io import BulkSocket, unexpected
from ._tcp_protocol import DATA, DONE, REQUEST_LIMIT_BYTES, Request, decode_request, encode_refusal
from ._types import CHUNK_BYTES, Integrity
from ._vectored import Vector

IDLE_S = 300.0
MAX_SERVE_S = 3600.0
REQUEST_S = 30.0
_NOTHING = np.empty(0, np.int64)


class TcpService:
    """One peer's connection, served by the thread that calls ``serve``."""

    def __init__(self, host: TransportHost, stream: Stream, agreed: Agreed) -> None:
        self._host = host
        self._peer = agreed.peer
        self._bulk = BulkSocket(stream, agreed.version)
        self._incarnation = host.description.incarnation

    def serve(self) -> None:
        """Serve until the peer leaves, the connection breaks, or it has been idle for long."""
        while True:
            try:
                self._bulk.spin()
                self._bulk.wait_readable(Deadline(IDLE_S))
            except (DeadlineExceededError, PeerClosedError):
                return
            kind, payload = self._bulk.recv_frame(REQUEST_LIMIT_BYTES, Deadline(REQUEST_S))
            if kind not in (FrameKind.READ, FrameKind.WRITE):
                raise unexpected(kind)
            request = decode_request(payload)
            deadline = Deadline(min(request.timeout_s, MAX_SERVE_S))
            if kind is FrameKind.READ:
                self._serve_read(request, deadline)
            else:
                self._serve_write(request, deadline)

    def _pieces(self, request: Request, addresses: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Pieces | None:
        if request.integrity is Integrity.NONE:
            return None
        return Pieces(self._incarnation, addresses, request.offsets, request.lengths)

    def _serve_read(self, request: Request, deadline: Deadline) -> None:
        try:
            admission = self._host.admit_read(self._peer, request.offsets, request.lengths)
        except RejectedError as error:
            self._refuse(request, error, deadline)
            return
        with admission:
            pieces = self._pieces(request, admission.addresses)
            body = DATA.pack(request.number, request.total_bytes)
            header = encode_header(FrameKind.DATA, len(body), self._bulk.version) + body
            vector = Vector(admission.addresses, request.lengths, prefix=header)
            self._bulk.send(vector, deadline, pieces, skip=len(header))
            if pieces is not None:
                pieces.advance(request.total_bytes)
        if pieces is not None:
            self._bulk.send_bytes(pieces.to_bytes(), deadline)
        self._host.count("bytes_served_read", request.total_bytes)

    def _serve_write(self, request: Request, deadline: Deadline) -> None:
        trailer = 0 if request.integrity is Integrity.NONE else 8 * piece_count(request.lengths)
        try:
            admission = self._host.admit_write(self._peer, request.token, request.offsets, request.lengths)
        except RejectedError as error:
            self._bulk.discard(request.total_bytes + trailer, deadline)
            self._refuse(request, error, deadline)
            return
        with admission:
            pieces = self._pieces(request, admission.addresses)
            vector = Vector(admission.addresses, request.lengths)
            is_granted = self._receive(vector, admission, deadline, pieces)
        self._host.count("bytes_served_write", vector.done)
        if not is_granted:
            self._bulk.discard(vector.remaining + trailer, deadline)
            self._refuse(request, GrantError("the grant was revoked or has expired"), deadline)
            return
        damaged = () if pieces is None else pieces.mismatches(self._bulk.recv_bytes(trailer, deadline))
        if damaged:
            self._refuse(request, IntegrityError(f"{len(damaged)} ranges arrived damaged", damaged), deadline)
            return
        answer = DONE.pack(request.number)
        self._bulk.send_bytes(encode_header(FrameKind.DONE, len(answer), self._bulk.version) + answer, deadline)

    def _receive(self, vector: Vector, admission: WriteAdmission, deadline: Deadline, pieces: Pieces | None) -> bool:
        """Receive into final memory, asking for the grant before each chunk; False once it does not hold any more.

        Waiting for bytes happens outside the chunk, so a writer that stops never holds up a revocation.
        """
        while vector.remaining:
            self._bulk.wait_readable(deadline)
            if not admission.begin_chunk():
                return False
            try:
                self._bulk.recv_now(vector, CHUNK_BYTES)
                if pieces is not None:
                    pieces.advance(vector.done)
            finally:
                admission.end_chunk()
        return True

    def _refuse(self, request: Request, error: TransferError, deadline: Deadline) -> None:
        self._host.count("refused_requests")
        self._bulk.send_bytes(encode_refusal(request.number, error, self._bulk.version), deadline)
