"""The ticket: the Conductor's signed permission for one decode instance to pull one request's KV from one prefill
instance.

Text form: ``v1.<payload>.<mac>``, both parts URL-safe base64 without padding; the payload is a msgpack array, the MAC
is HMAC-SHA256 under the cluster secret over everything before it. Addresses are inside, so nobody but the Conductor
decides where an engine connects to.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from itertools import islice

import msgspec

from mooncake_plugins.errors import TicketError

_PREFIX = "v1."
# Room for the addresses of a few hundred workers.
_MAX_TEXT = 16384
_CONTEXT = b"mooncake-plugins ticket\0"


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """One hand-off that the Conductor allows.

    Attributes:
        id: 32 hex digits, unique; a ticket is used once.
        prefill: Instance id of the prefill engine.
        addresses: Where its workers listen: ``"pp,tp"`` -> ``"host:port"``.
        expires_at: Unix time in seconds after which nobody accepts it.
    """

    id: str
    prefill: str
    addresses: dict[str, str]
    expires_at: float


def sign_ticket(ticket: Ticket, key: bytes) -> str:
    """Return the ticket's text form (URL-safe, a few hundred characters).

    Raises:
        TicketError: ``malformed``: it has so many addresses that nobody would accept it.
    """
    body = _PREFIX + _b64(msgspec.msgpack.encode(ticket))
    text = f"{body}.{_b64(_mac(body, key))}"
    if len(text) > _MAX_TEXT:
        raise TicketError("malformed", f"{len(ticket.addresses)} addresses make it longer than {_MAX_TEXT} characters")
    return text


def verify_ticket(text: object, key: bytes, now: float) -> Ticket:
    """Decode a ticket's text form after checking its signature.

    Args:
        text: Whatever arrived; anything but a valid ticket is refused.
        key: The cluster secret; empty when there is none.
        now: Unix time in seconds.

    Raises:
        TicketError: ``reason`` is ``malformed``, ``forged`` or ``expired``. (``reused`` is found by ``TicketBook``.)
    """
    if not isinstance(text, str) or len(text) > _MAX_TEXT or not text.isascii():
        raise TicketError("malformed", "not a short ASCII text")
    body, _, mac = text.rpartition(".")
    if not body.startswith(_PREFIX):
        raise TicketError("malformed", "unknown version")
    if not hmac.compare_digest(_b64(_mac(body, key)), mac):
        raise TicketError("forged", "the signature is not of this cluster's secret")
    try:
        ticket = msgspec.msgpack.decode(_unb64(body[len(_PREFIX) :]), type=Ticket)
    except (msgspec.DecodeError, binascii.Error, ValueError) as error:
        raise TicketError("malformed", str(error)) from error
    if now >= ticket.expires_at:
        raise TicketError("expired", f"{now - ticket.expires_at:.1f} s ago")
    return ticket


class TicketBook:
    """Remembers which tickets were used, until they expire anyway.

    Not thread-safe: one owner. Memory: one entry a live ticket.
    """

    def __init__(self) -> None:
        self._expiry: dict[str, float] = {}

    def use(self, ticket: Ticket, now: float) -> None:
        """Record the use of a ticket.

        Raises:
            TicketError: ``reused``.
        """
        self._forget(now)
        if ticket.id in self._expiry:
            raise TicketError("reused", f"id {ticket.id}")
        self._expiry[ticket.id] = ticket.expires_at

    def _forget(self, now: float) -> None:
        # Entries come roughly in order of expiry, so the oldest are looked at first and the scan stays short.
        for ticket_id, expires_at in list(islice(self._expiry.items(), 8)):
            if expires_at <= now:
                del self._expiry[ticket_id]


def _mac(body: str, key: bytes) -> bytes:
    return hmac.digest(key, _CONTEXT + body.encode(), hashlib.sha256)


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unb64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
