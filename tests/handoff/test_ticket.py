"""Tickets: what is accepted is exactly what was signed, before it expires, once."""

from __future__ import annotations

import base64
import string

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_plugins.errors import TicketError
from mooncake_plugins.handoff import Ticket, TicketBook, sign_ticket, verify_ticket

KEY = b"a secret of at least 16 bytes"
NOW = 1_000_000.0
TICKET = Ticket("0123456789abcdef" * 2, "prefill-7", {"0,0": "10.0.0.1:4000", "0,1": "10.0.0.1:4001"}, NOW + 60)
TEXT = sign_ticket(TICKET, KEY)
ALPHABET = string.ascii_letters + string.digits + "-_.=+/ \n\0é"


def reason(text: object, *, key: bytes = KEY, now: float = NOW) -> str:
    """Why a text is refused."""
    with pytest.raises(TicketError) as caught:
        verify_ticket(text, key, now)
    return caught.value.reason


def test_a_signed_ticket_is_accepted_and_says_what_was_signed() -> None:
    assert verify_ticket(TEXT, KEY, NOW) == TICKET


def test_the_text_is_url_safe() -> None:
    assert set(TEXT) <= set(string.ascii_letters + string.digits + "-_.")


def test_a_cluster_without_a_secret_signs_with_the_empty_key() -> None:
    assert verify_ticket(sign_ticket(TICKET, b""), b"", NOW) == TICKET
    assert reason(sign_ticket(TICKET, b"")) == "forged"


def test_another_secret_makes_it_forged() -> None:
    assert reason(TEXT, key=b"some other secret of the cluster") == "forged"
    assert reason(TEXT, key=KEY[:-1]) == "forged"


@pytest.mark.parametrize("position", range(len(TEXT)))
def test_no_character_can_be_changed(position: int) -> None:
    for character in ALPHABET:
        if character != TEXT[position]:
            changed = TEXT[:position] + character + TEXT[position + 1 :]
            assert reason(changed) in ("forged", "malformed"), changed


@given(st.text(alphabet=ALPHABET, max_size=6), st.integers(0, len(TEXT)), st.integers(0, len(TEXT)))
def test_no_piece_can_be_replaced(piece: str, start: int, end: int) -> None:
    changed = TEXT[: min(start, end)] + piece + TEXT[max(start, end) :]
    if changed != TEXT:
        assert reason(changed) in ("forged", "malformed")


@given(st.none() | st.booleans() | st.integers() | st.binary() | st.lists(st.integers()) | st.text())
def test_whatever_arrives_instead_is_refused(text: object) -> None:
    assert reason(text) in ("forged", "malformed")


def test_text_that_is_not_ascii_is_malformed() -> None:
    assert reason(TEXT + "é") == "malformed"
    assert reason("v1.é.ü") == "malformed"


def test_text_that_is_too_long_is_malformed() -> None:
    assert reason("v1." + "A" * 20_000 + ".B") == "malformed"


def test_another_version_is_malformed() -> None:
    assert reason("v2" + TEXT[2:]) == "malformed"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(["id", "prefill", {}]),
        msgspec.msgpack.encode(["id", "prefill", {"0,0": 5}, NOW + 60]),
        msgspec.msgpack.encode({"id": "x"}),
    ],
)
def test_a_signed_text_that_holds_no_ticket_is_malformed(payload: bytes) -> None:
    assert reason(signed(base64.urlsafe_b64encode(payload).rstrip(b"=").decode())) == "malformed"


def test_a_signed_text_that_is_no_base64_is_malformed() -> None:
    assert reason(signed("A")) == "malformed"
    assert reason(signed("!!!!")) == "malformed"


def test_a_ticket_is_accepted_until_it_expires_and_not_after() -> None:
    assert verify_ticket(TEXT, KEY, TICKET.expires_at - 0.001) == TICKET
    assert reason(TEXT, now=TICKET.expires_at) == "expired"


def test_a_forged_ticket_is_not_told_that_it_expired() -> None:
    assert reason(TEXT, key=b"other", now=TICKET.expires_at + 1) == "forged"


def test_a_ticket_for_many_workers_fits() -> None:
    addresses = {f"{pp},{tp}": f"prefill-node-{pp}.cluster.example:{41000 + tp}" for pp in range(8) for tp in range(16)}
    ticket = Ticket("f" * 32, "prefill-7", addresses, NOW + 60)
    assert verify_ticket(sign_ticket(ticket, KEY), KEY, NOW) == ticket


def test_a_ticket_that_nobody_would_accept_is_not_signed() -> None:
    addresses = {f"0,{tp}": "h" * 200 for tp in range(200)}
    with pytest.raises(TicketError, match="malformed"):
        sign_ticket(Ticket("f" * 32, "prefill-7", addresses, NOW + 60), KEY)


def test_a_ticket_is_used_once() -> None:
    book = TicketBook()
    book.use(TICKET, NOW)
    with pytest.raises(TicketError) as caught:
        book.use(TICKET, NOW + 1)
    assert caught.value.reason == "reused"
    book.use(msgspec.structs.replace(TICKET, id="e" * 32), NOW + 1)


def test_books_do_not_know_of_each_other() -> None:
    TicketBook().use(TICKET, NOW)
    TicketBook().use(TICKET, NOW)


def test_a_book_remembers_a_ticket_as_long_as_it_is_valid() -> None:
    book = TicketBook()
    book.use(TICKET, NOW)
    for index in range(100):
        book.use(Ticket(f"{index:032x}", "p", {}, NOW + 1), NOW)
    with pytest.raises(TicketError, match="reused"):
        book.use(TICKET, TICKET.expires_at - 0.1)


def test_a_book_forgets_expired_tickets() -> None:
    book = TicketBook()
    for index in range(10_000):
        book.use(Ticket(f"{index:032x}", "p", {}, NOW + index + 60), NOW + index)
    assert len(book._expiry) < 100


def signed(payload: str) -> str:
    """A text whose signature is right, whatever it holds."""
    from mooncake_plugins.handoff import _ticket

    body = f"v1.{payload}"
    return f"{body}.{_ticket._b64(_ticket._mac(body, KEY))}"
