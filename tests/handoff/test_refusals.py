"""Who is refused, how both sides learn why, and that nothing waits or stays behind."""

from __future__ import annotations

import socket
import time
from contextlib import closing

import msgspec
import pytest

from mooncake_plugins.config import Secret
from mooncake_plugins.errors import MooncakeError, PeerClosedError
from mooncake_plugins.handoff import HANDOFF_ROLE, HandoffOptions, Ticket, ToDecode, WatchState, sign_ticket
from mooncake_plugins.handoff import _messages as wire
from mooncake_plugins.kv import Coordinate
from mooncake_plugins.wire import Deadline, FrameKind, Identity, dial, encode_frame, new_incarnation
from tests.handoff.conftest import MakeDecode, MakePrefill
from tests.handoff.harness import FINGERPRINT, KEY, SECRET, DecodeSide, PrefillSide, wait_until

P_IDS, D_IDS = [1, 2, 3], [4, 5, 6]
PROMPT = b"prompt"


def assert_refused(decode: DecodeSide, request: str, reason: str, *details: str) -> None:
    """The pull was refused for a reason that names these details, and its blocks are zeroed."""
    result = decode.result(request)
    assert result.outcome.startswith(f"refused ({reason})"), result.outcome
    for detail in details:
        assert detail in result.outcome
    assert result.bad_block_ids == tuple(D_IDS) and result.received_bytes == 0
    assert decode.memory.holds_only(D_IDS, 0)


@pytest.fixture(autouse=True)
def stale_bytes(decode: DecodeSide) -> None:
    decode.memory.fill(D_IDS, 0xEE)


def test_a_forged_ticket(prefill: PrefillSide, decode: DecodeSide) -> None:
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS, text=sign_ticket(ticket, b"another secret entirely"))
    assert_refused(decode, request, "forged")
    assert prefill.service.counters["refused_forged"] == 1


@pytest.mark.parametrize("text", ["", "x", "v1.AAAA.BBBB", "é" * 10, "v1." + "A" * 20_000 + ".B"])
def test_a_malformed_ticket(prefill: PrefillSide, decode: DecodeSide, text: str) -> None:
    request = decode.pull(prefill.ticket(), PROMPT, D_IDS, text=text)
    result = decode.result(request)
    assert result.outcome.startswith(("refused (malformed)", "refused (forged)"))
    assert prefill.service.live_transfers == 0


def test_an_expired_ticket(prefill: PrefillSide, decode: DecodeSide) -> None:
    request = decode.pull(prefill.ticket(expires_in_s=-1.0), PROMPT, D_IDS)
    assert_refused(decode, request, "expired", "s ago")


def test_a_ticket_for_another_instance(make_prefill: MakePrefill, prefill: PrefillSide, decode: DecodeSide) -> None:
    other = make_prefill()
    ticket = msgspec.structs.replace(other.ticket(), addresses={"0,0": prefill.engine.address})
    request = decode.pull(ticket, PROMPT, D_IDS)
    assert_refused(decode, request, "instance", other.instance, prefill.instance)


def test_a_ticket_of_another_transfer(prefill: PrefillSide, decode: DecodeSide) -> None:
    request = decode.pull(prefill.ticket(), PROMPT, D_IDS, text=sign_ticket(prefill.ticket(), KEY))
    assert_refused(decode, request, "malformed", "another transfer")


def test_a_ticket_that_another_worker_has_used(
    prefill: PrefillSide, decode: DecodeSide, make_decode: MakeDecode
) -> None:
    first = make_decode()
    ticket = prefill.ticket()
    good = first.pull(ticket, PROMPT, D_IDS)
    prefill.chunk(ticket.id, PROMPT, P_IDS, 0, 2)
    wait_until(lambda: first.service.counters["pulls"] and prefill.service.counters["commits"], "the first to pull")
    assert_refused(decode, decode.pull(ticket, PROMPT, D_IDS), "reused")
    prefill.chunk(ticket.id, PROMPT, P_IDS, 2, 3)
    assert first.result(good).outcome == "ok", "the first one is not disturbed"
    assert first.memory.wrong(PROMPT, D_IDS) == []


def test_a_ticket_that_the_same_worker_has_used(prefill: PrefillSide, decode: DecodeSide) -> None:
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert decode.result(request).outcome == "ok"
    prefill.wait_quiet()
    assert_refused(decode, decode.pull(ticket, PROMPT, D_IDS), "reused")


def test_another_fingerprint_is_refused_with_both_values(make_prefill: MakePrefill, decode: DecodeSide) -> None:
    prefill = make_prefill(fingerprint={**FINGERPRINT, "dtype": "bfloat16", "block_size": 64})
    request = decode.pull(prefill.ticket(), PROMPT, D_IDS)
    assert_refused(
        decode, request, "fingerprint",
        "dtype is 'float32' on decode and 'bfloat16' on prefill", "block_size is 16 on decode and 64 on prefill",
    )  # fmt: skip


def test_the_watcher_is_told_of_another_fingerprint(make_prefill: MakePrefill, decode: DecodeSide) -> None:
    prefill = make_prefill(fingerprint={**FINGERPRINT, "model": "other"})
    ticket = prefill.ticket()
    decode.watcher.watch(ticket, sign_ticket(ticket, KEY), PROMPT, 48)
    wait_until(lambda: decode.watcher.state(ticket.id) is WatchState.DECLINED, "the refusal")
    session = decode.watcher.end(ticket.id)
    assert session is not None and session.reason == "fingerprint"
    assert "model is 'm' on decode and 'other' on prefill" in session.detail


def test_another_coordinate(make_prefill: MakePrefill, decode: DecodeSide) -> None:
    prefill = make_prefill(coordinate=Coordinate(tp=1, tp_size=2))
    request = decode.pull(prefill.ticket(), PROMPT, D_IDS)
    assert_refused(decode, request, "coordinate", "this worker is 0,1, asked for 0,0")


def test_another_prompt(prefill: PrefillSide, decode: DecodeSide) -> None:
    ticket = prefill.ticket()
    request = decode.pull(ticket, b"another prompt", D_IDS, tokens=47)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert_refused(decode, request, "prompt", "(47 tokens)", "(48 tokens)")
    prefill.wait_freed(ticket.id)


def test_the_watcher_is_told_of_another_prompt(prefill: PrefillSide, decode: DecodeSide) -> None:
    ticket = prefill.ticket()
    decode.watcher.watch(ticket, sign_ticket(ticket, KEY), b"another prompt", 48)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    wait_until(lambda: decode.watcher.state(ticket.id) is WatchState.DECLINED, "the refusal")
    session = decode.watcher.end(ticket.id, release="declined")
    assert session is not None and session.reason == "prompt"
    prefill.wait_freed(ticket.id)


# --- whoever comes too late ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False], ids=["after it began", "before it began"])
def test_a_prefill_that_was_aborted_refuses_at_once(prefill: PrefillSide, decode: DecodeSide, known: bool) -> None:
    ticket = prefill.ticket()
    if known:
        prefill.chunk(ticket.id, PROMPT, P_IDS, 0, 2)
    prefill.abort(ticket.id)
    started = time.monotonic()
    assert_refused(decode, decode.pull(ticket, PROMPT, D_IDS), "ended", "aborted")
    assert time.monotonic() - started < 10
    prefill.wait_quiet()


def test_a_lease_that_ran_out_refuses_at_once(make_prefill: MakePrefill, decode: DecodeSide) -> None:
    prefill = make_prefill(options=HandoffOptions(lease_s=0.05))
    ticket = prefill.ticket()
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    prefill.wait_freed(ticket.id)
    assert_refused(decode, decode.pull(ticket, PROMPT, D_IDS), "ended", "lease")


def test_a_worker_is_served_although_its_scheduler_left_first(prefill: PrefillSide, decode: DecodeSide) -> None:
    ticket = prefill.ticket()
    decode.watcher.watch(ticket, sign_ticket(ticket, KEY), PROMPT, 48)
    prefill.begin(ticket.id, PROMPT, P_IDS, 0, 3)
    wait_until(lambda: decode.watcher.state(ticket.id) is WatchState.READY, "the watcher to be told")
    decode.watcher.close()
    wait_until(lambda: prefill.engine.metrics()["connections_in"] == 0, "prefill to notice")
    request = decode.pull(ticket, PROMPT, D_IDS)
    for layer in range(4):
        prefill.compute(PROMPT, layer, P_IDS, 0, 3)
    prefill.service.end_step()
    assert decode.result(request).outcome == "ok"


# --- nobody to talk to -----------------------------------------------------------------------------------------------


def test_a_ticket_without_an_address_of_this_rank(prefill: PrefillSide, decode: DecodeSide) -> None:
    ticket = msgspec.structs.replace(prefill.ticket(), addresses={"0,1": prefill.engine.address})
    result = decode.result(decode.pull(ticket, PROMPT, D_IDS))
    assert result.outcome != "ok" and result.bad_block_ids == tuple(D_IDS)
    decode.watcher.watch(ticket, sign_ticket(ticket, KEY), PROMPT, 48)
    wait_until(lambda: decode.watcher.state(ticket.id) is WatchState.DECLINED, "the watcher to give up")


@pytest.mark.parametrize(
    "address",
    ["", "nonsense", "127.0.0.1:0", "127.0.0.1:99999", "a..b:1", "x" * 300 + ":1", "\0:1", "[::1", "http://x:1"],
)
def test_an_address_that_cannot_be_used_fails_the_pull_at_once(decode: DecodeSide, address: str) -> None:
    ticket = Ticket("0" * 32, "p", {"0,0": address}, time.time() + 60)
    result = decode.result(decode.pull(ticket, PROMPT, D_IDS))
    assert result.outcome != "ok" and result.bad_block_ids == tuple(D_IDS)
    assert decode.memory.holds_only(D_IDS, 0)


def test_a_prefill_that_is_not_there(decode: DecodeSide) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    ticket = Ticket("0" * 32, "p", {"0,0": address}, time.time() + 60)
    assert decode.result(decode.pull(ticket, PROMPT, D_IDS)).outcome != "ok"
    decode.watcher.watch(ticket, sign_ticket(ticket, KEY), PROMPT, 48)
    wait_until(lambda: decode.watcher.state(ticket.id) is WatchState.DECLINED, "the watcher to give up")
    session = decode.watcher.end(ticket.id)
    assert session is not None and session.reason == "unreachable"


def test_a_prefill_with_another_secret(make_prefill: MakePrefill, decode: DecodeSide) -> None:
    prefill = make_prefill(secret=Secret(b"the secret of another cluster"))
    result = decode.result(decode.pull(prefill.ticket(), PROMPT, D_IDS))
    assert "secret" in result.outcome and result.bad_block_ids == tuple(D_IDS)
    assert prefill.service.live_transfers == 0


def test_without_secrets_everything_works_on_this_host(make_prefill: MakePrefill, make_decode: MakeDecode) -> None:
    prefill, decode = make_prefill(secret=None), make_decode(secret=None)
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS, text=sign_ticket(ticket, b""))
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert decode.result(request).outcome == "ok"


# --- nonsense on the channel -----------------------------------------------------------------------------------------

ENCODE = msgspec.msgpack.encode
FRAME = FrameKind.MESSAGE


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": b"\0" * 100,
    "ones": b"\xff" * 100,
    "empty message": encode_frame(FRAME, b""),
    "no msgpack": encode_frame(FRAME, b"\xc1garbage"),
    "unknown message": encode_frame(FRAME, ENCODE(["no such message", 1])),
    "negative number": encode_frame(FRAME, ENCODE(["fetched", "t", -1, 0])),
    "huge number": encode_frame(FRAME, ENCODE(["fetched", "t", 1 << 50, 0])),
    "too few fields": encode_frame(FRAME, ENCODE(["attach", "t"])),
    "wrong direction": encode_frame(FRAME, ENCODE(["ready", "t", 0, 1, 0, 1, 0, [1]])),
    "a map": encode_frame(FRAME, ENCODE({"role": "attach"})),
    "deep nesting": encode_frame(FRAME, b"\x91" * 5000),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_on_the_channel_ends_that_channel_only(
    prefill: PrefillSide, decode: DecodeSide, garbage: bytes
) -> None:
    stream, _ = dial(prefill.engine.address, HANDOFF_ROLE, Identity("d", new_incarnation()), SECRET, Deadline(5.0))
    with closing(stream):
        stream.send_all(garbage, Deadline(5.0))
        said = b""
        while piece := stream.recv_some(65536, Deadline(10.0)):
            said += piece
    assert said, "it is told why"
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert decode.result(request).outcome == "ok", "others are served as before"


def test_messages_about_unknown_transfers_are_ignored(prefill: PrefillSide, decode: DecodeSide) -> None:
    channel = decode.engine.connect(prefill.engine.address, HANDOFF_ROLE, message_type=ToDecode, timeout_s=3.0)
    with channel:
        for message in (wire.Fetched("t", 0, 1), wire.Release("t", "ok"), wire.Ping(7)):
            channel.send(message, timeout_s=1.0)
        assert channel.recv(timeout_s=5.0) == wire.Pong(7)


def test_a_silent_peer_is_closed(make_prefill: MakePrefill, decode: DecodeSide) -> None:
    prefill = make_prefill(options=HandoffOptions(peer_timeout_s=0.2))
    channel = decode.engine.connect(prefill.engine.address, HANDOFF_ROLE, message_type=ToDecode, timeout_s=3.0)
    with channel, pytest.raises(PeerClosedError):
        channel.recv(timeout_s=10.0)


def test_a_quiet_link_is_kept_alive(make_prefill: MakePrefill, make_decode: MakeDecode) -> None:
    options = HandoffOptions(peer_timeout_s=0.4)
    prefill, decode = make_prefill(options=options), make_decode(options=options)
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    wait_until(lambda: prefill.service.live_transfers == 1, "the worker to attach")
    opened = time.monotonic()
    wait_until(lambda: time.monotonic() - opened > 1.0, "more than the silence that ends a link")
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert decode.result(request).outcome == "ok"
    assert prefill.engine.metrics()["connections_in"] >= 1


def test_a_prefill_service_that_was_closed_serves_nobody(prefill: PrefillSide, decode: DecodeSide) -> None:
    prefill.service.close()
    result = decode.result(decode.pull(prefill.ticket(), PROMPT, D_IDS))
    assert result.outcome != "ok"
    with pytest.raises(MooncakeError):
        decode.engine.connect(prefill.engine.address, "no such role", message_type=ToDecode, timeout_s=3.0)
