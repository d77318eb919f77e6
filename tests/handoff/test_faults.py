"""What fails in the middle of a hand-off: no wrong byte is believed, nothing lands late, nothing stays held."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mooncake_plugins.handoff import HandoffOptions, HandoffStep, PullResult, PullService
from mooncake_plugins.handoff import _pull_service as pull_service
from mooncake_plugins.transfer import BatchStatus
from mooncake_plugins.transports import Work
from tests.handoff.child import RemoteSide
from tests.handoff.conftest import MakeDecode, MakePrefill
from tests.handoff.harness import BLOCK_BYTES, LAYERS, PATIENCE_S, DecodeSide, Faults, Memory, PrefillSide, wait_until

P_IDS, D_IDS = [9, 3, 60, 31], [1, 50, 2, 49]
PROMPT = b"prompt"
BIG = {"blocks": 8, "block_bytes": 1 << 20}  # 32 MiB in 4 layers: more than sockets hold


class Gate:
    """Holds up reads of the ``faulty`` transport until it is opened."""

    def __init__(self, faults: Faults) -> None:
        self.entered, self._opened = threading.Event(), threading.Event()
        faults.before = self._pass

    def _pass(self, work: Work) -> None:
        self.entered.set()
        assert self._opened.wait(PATIENCE_S), "nobody opened the gate"

    def wait_entered(self) -> None:
        assert self.entered.wait(PATIENCE_S), "no read came"

    def open(self) -> None:
        self._opened.set()


def flip_bit(work: Work) -> None:
    """Spoil what has just arrived."""
    ctypes.c_ubyte.from_address(int(work.addresses[0])).value ^= 0x10


# --- wrong bytes -----------------------------------------------------------------------------------------------------


def test_a_flipped_bit_on_the_wire_is_one_mismatch_and_one_bad_block(
    make_prefill: MakePrefill, make_decode: MakeDecode, faults: Faults
) -> None:
    prefill = make_prefill(transport="faulty")
    decode = make_decode(transport="faulty", options=HandoffOptions(read_bytes=BLOCK_BYTES))
    numbers = itertools.count()
    faults.after = lambda work: flip_bit(work) if next(numbers) == 0 else None
    ticket = prefill.ticket()
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    result = decode.result(decode.pull(ticket, PROMPT, D_IDS))
    assert result.outcome == "checksum"
    assert decode.service.counters["checksum_mismatches"] == 1
    assert len(result.bad_block_ids) == 1 and result.good_blocks == 3
    assert decode.service.counters["blocks_failed"] == 1 and decode.service.counters["pulls_failed"] == 1
    (bad,) = result.bad_block_ids
    assert decode.memory.holds_only([bad], 0), "a bad block is zeroed before it is reported"
    good = [(place, block_id) for place, block_id in enumerate(D_IDS) if block_id != bad]
    assert all(decode.memory.wrong(PROMPT, [block_id], place) == [] for place, block_id in good)
    prefill.wait_freed(ticket.id)


def test_control_without_verification_a_flipped_bit_is_believed(
    make_prefill: MakePrefill, make_decode: MakeDecode, faults: Faults
) -> None:
    prefill = make_prefill(transport="faulty")
    decode = make_decode(transport="faulty", options=HandoffOptions(verify=False))
    faults.after = flip_bit
    ticket = prefill.ticket()
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    result = decode.result(decode.pull(ticket, PROMPT, D_IDS))
    assert (result.outcome, result.good_blocks) == ("ok", 4)
    assert decode.memory.wrong(PROMPT, D_IDS) != []


def test_right_bytes_in_the_wrong_place_are_seen(
    make_prefill: MakePrefill, make_decode: MakeDecode, faults: Faults
) -> None:
    prefill, decode = make_prefill(transport="faulty"), make_decode(transport="faulty")

    numbers = itertools.count()

    def swap(work: Work) -> None:
        if next(numbers):
            return
        first, second = decode.memory.block(0, D_IDS[0]), decode.memory.block(0, D_IDS[1])
        first[:], second[:] = second.copy(), first.copy()

    faults.after = swap
    ticket = prefill.ticket()
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    result = decode.result(decode.pull(ticket, PROMPT, D_IDS))
    assert result.outcome == "checksum" and set(D_IDS[:2]) <= set(result.bad_block_ids)
    assert decode.memory.holds_only(result.bad_block_ids, 0)


def test_a_transport_that_fails_is_a_failed_load(
    make_prefill: MakePrefill, make_decode: MakeDecode, faults: Faults
) -> None:
    prefill, decode = make_prefill(transport="faulty"), make_decode(transport="faulty")

    def fail(work: Work) -> None:
        raise OSError("the cable is cut")

    faults.before = fail
    ticket = prefill.ticket()
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    result = decode.result(decode.pull(ticket, PROMPT, D_IDS))
    assert "the cable is cut" in result.outcome and result.bad_block_ids == tuple(D_IDS)
    prefill.wait_freed(ticket.id)


# --- prefill takes its blocks back -----------------------------------------------------------------------------------


def test_preemption_in_the_middle_of_a_read_restarts_and_ends_with_the_right_bytes(
    make_prefill: MakePrefill, make_decode: MakeDecode, faults: Faults
) -> None:
    prefill, decode = make_prefill(transport="faulty"), make_decode(transport="faulty")
    gate = Gate(faults)
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.chunk(ticket.id, PROMPT, P_IDS, 0, 3)
    gate.wait_entered()
    prefill.preempt(ticket.id)
    prefill.memory.fill(P_IDS, 0x66)
    gate.open()
    again = [20, 21, 22, 23]
    prefill.prefill(ticket.id, PROMPT, again)
    assert decode.result(request).outcome == "ok"
    assert decode.memory.wrong(PROMPT, D_IDS) == []
    prefill.wait_freed(ticket.id)


def test_preemption_again_and_again_while_reads_are_under_way(
    make_prefill: MakePrefill, make_decode: MakeDecode
) -> None:
    options = HandoffOptions(read_bytes=BLOCK_BYTES, readers=3)
    prefill, decode = make_prefill(transport="tcp", options=options), make_decode(transport="tcp", options=options)
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    wait_until(lambda: prefill.service.live_transfers, "the worker to attach")
    for round_ in range(10):
        ids = [(4 * round_ + i) % 60 for i in range(4)]
        prefill.chunk(ticket.id, PROMPT, ids, 0, 3)
        prefill.preempt(ticket.id)
        prefill.memory.fill(ids, round_ + 1)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert decode.result(request).outcome == "ok"
    assert decode.memory.wrong(PROMPT, D_IDS) == []


def test_a_commit_is_withheld_when_the_blocks_were_taken_away_before_it_is_sent(
    prefill: PrefillSide, decode: DecodeSide
) -> None:
    """The engine thread overwrites blocks at once; the thread that commits learns of it only later, by event."""
    hashed, busy, go = threading.Event(), threading.Event(), threading.Event()
    original = prefill.service._checksums

    def hash_late(transfer: str, span: Any) -> Any:
        prefill.service._inbox.put(stall)
        assert busy.wait(10)
        sums = original(transfer, span)
        hashed.set()
        return sums

    def stall() -> None:
        busy.set()
        assert go.wait(10)

    prefill.service._checksums = hash_late  # type: ignore[method-assign]
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.chunk(ticket.id, PROMPT, P_IDS, 0, 4)
    assert hashed.wait(10)
    wait_until(lambda: prefill.service._inbox.qsize() >= 1, "the hashed span to wait for the thread that commits")
    prefill.service._checksums = original  # type: ignore[method-assign]
    prefill.preempt(ticket.id)
    prefill.memory.fill(P_IDS, 0x66)
    go.set()
    wait_until(lambda: prefill.service.counters["commits_withheld"] == 1, "the commit to be withheld")
    assert prefill.service.counters["commits"] == 0
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert decode.result(request).outcome == "ok"
    assert decode.memory.wrong(PROMPT, D_IDS) == []


def test_an_abort_on_prefill_fails_the_pull_and_zeroes_its_blocks(
    make_prefill: MakePrefill, make_decode: MakeDecode, faults: Faults
) -> None:
    prefill, decode = make_prefill(transport="faulty"), make_decode(transport="faulty")
    gate = Gate(faults)
    decode.memory.fill(D_IDS, 0xEE)
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.chunk(ticket.id, PROMPT, P_IDS, 0, 3)
    gate.wait_entered()
    prefill.abort(ticket.id)
    prefill.memory.fill(P_IDS, 0x66)
    wait_until(lambda: prefill.service.live_transfers == 0, "prefill to forget it")
    assert not decode.has_result(request), "not while a read may still land"
    gate.open()
    result = decode.result(request)
    assert "aborted" in result.outcome and result.bad_block_ids == tuple(D_IDS)
    assert decode.memory.holds_only(D_IDS, 0)
    assert not prefill.is_freed(ticket.id), "the engine freed them itself"


def test_the_lease_frees_and_withdraws(make_prefill: MakePrefill, make_decode: MakeDecode, faults: Faults) -> None:
    prefill = make_prefill(transport="faulty", options=HandoffOptions(lease_s=0.2))
    decode = make_decode(transport="faulty")
    gate = Gate(faults)
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    gate.wait_entered()
    prefill.wait_freed(ticket.id)
    prefill.memory.fill(P_IDS, 0x66)
    gate.open()
    result = decode.result(request)
    assert "lease" in result.outcome and result.bad_block_ids == tuple(D_IDS)
    assert decode.memory.holds_only(D_IDS, 0)
    assert prefill.service.counters["transfers_withdrawn"] == 1


def test_the_lease_frees_when_nobody_comes(make_prefill: MakePrefill) -> None:
    prefill = make_prefill(options=HandoffOptions(lease_s=0.1))
    ticket = prefill.ticket()
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    prefill.wait_freed(ticket.id)
    prefill.wait_quiet()


# --- decode gives up -------------------------------------------------------------------------------------------------


def test_a_cancelled_pull_is_reported_only_when_nothing_lands_any_more(
    make_prefill: MakePrefill, make_decode: MakeDecode, faults: Faults
) -> None:
    prefill, decode = make_prefill(transport="faulty"), make_decode(transport="faulty")
    gate = Gate(faults)
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    gate.wait_entered()
    decode.service.cancel([request])
    time_to_be_wrong = time.monotonic() + 0.3
    wait_until(lambda: decode.has_result(request) or time.monotonic() > time_to_be_wrong, "a report that must not come")
    assert not decode.has_result(request)
    gate.open()
    result = decode.result(request)
    assert result.outcome == "cancelled" and decode.memory.holds_only(D_IDS, 0)
    prefill.wait_freed(ticket.id)


def test_a_pull_that_is_cancelled_before_it_began_is_reported(prefill: PrefillSide, decode: DecodeSide) -> None:
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    decode.service.cancel([request, "no such request"])
    assert decode.result(request).outcome == "cancelled"
    prefill.prefill(ticket.id, PROMPT, P_IDS)


def test_a_pull_has_a_deadline(make_prefill: MakePrefill, make_decode: MakeDecode) -> None:
    prefill, decode = make_prefill(), make_decode(options=HandoffOptions(transfer_timeout_s=0.3))
    ticket = prefill.ticket()
    result = decode.result(decode.pull(ticket, PROMPT, D_IDS))
    assert result.outcome == "deadline" and result.bad_block_ids == tuple(D_IDS)


def test_a_read_that_its_engine_does_not_end_is_not_reported(
    prefill: PrefillSide, decode: DecodeSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_service, "_FENCE_GRACE_S", 0.05)
    ended = threading.Event()

    class StuckBatch:
        error = None

        def wait(self, timeout_s: float) -> BatchStatus:
            return BatchStatus.CANCELLED if ended.wait(min(timeout_s, 0.05)) else BatchStatus.PENDING

        def cancel(self) -> None:
            pass

    monkeypatch.setattr(decode.engine, "submit", lambda *_, **__: StuckBatch())
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    wait_until(lambda: any(s.jobs for s in list(decode.service._sessions.values())), "a read to begin")
    decode.service.cancel([request])
    time_to_be_wrong = time.monotonic() + 0.5
    wait_until(lambda: decode.has_result(request) or time.monotonic() > time_to_be_wrong, "a report that must not come")
    assert not decode.has_result(request)
    ended.set()
    assert decode.result(request).outcome == "cancelled"


def test_a_transfer_that_is_pulled_twice_at_once_fails_the_second_time_only(
    prefill: PrefillSide, decode: DecodeSide
) -> None:
    ticket = prefill.ticket()
    first = decode.pull(ticket, PROMPT, D_IDS)
    second = decode.pull(ticket, PROMPT, [5, 6, 7, 8])
    assert decode.result(second) == PullResult(second, "reused here", (5, 6, 7, 8), 0, 0, 0.0, 0.0)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert decode.result(first).outcome == "ok"
    assert decode.memory.wrong(PROMPT, D_IDS) == []


# --- processes -------------------------------------------------------------------------------------------------------


def test_two_processes_over_tcp(make_decode: MakeDecode) -> None:
    decode = make_decode(transport="tcp", memory=Memory(**BIG))
    with RemoteSide("prefill", memory=BIG) as prefill:
        ticket = prefill.ticket()
        request = decode.pull(ticket, PROMPT, range(7, -1, -1))
        prefill.ask("prefill", transfer=ticket.id, prompt="prompt", ids=list(range(8)))
        assert decode.result(request).outcome == "ok"
        assert decode.memory.wrong(PROMPT, range(7, -1, -1)) == []
        assert decode.service.counters["bytes_received"] == 32 << 20
        wait_until(lambda: prefill.ask("live_transfers") == 0, "prefill to free")


def frozen_mid_transfer(decode: DecodeSide, prefill: RemoteSide, ids: Sequence[int]) -> str:
    """Let prefill stop itself after it has sent some of a transfer's bytes; returns the request."""
    ticket = prefill.ticket()
    prefill.ask("stop_after", call="send", nth=2)
    request = decode.pull(ticket, PROMPT, ids)
    prefill.begin("prefill", transfer=ticket.id, prompt="prompt", ids=list(range(8)))
    prefill.wait_frozen()
    return request


def test_prefill_stopped_mid_transfer_then_resumed_changes_no_byte(make_decode: MakeDecode) -> None:
    decode = make_decode(transport="tcp", memory=Memory(**BIG), options=HandoffOptions(peer_timeout_s=0.5))
    ids = list(range(8))
    with RemoteSide("prefill", memory=BIG, peer_timeout_s=0.5) as prefill:
        request = frozen_mid_transfer(decode, prefill, ids)
        result = decode.result(request, timeout_s=10)
        assert "silent" in result.outcome
        assert set(result.bad_block_ids) == set(ids)
        decode.memory.fill(ids, 0xAB)  # the engine uses its blocks for something else
        prefill.resume()
        prefill.answer()
        wait_until(lambda: prefill.ask("live_transfers") == 0, "prefill to notice and to free")
        assert decode.memory.holds_only(ids, 0xAB), "a byte landed after the report"
        again = prefill.ticket()
        request = decode.pull(again, PROMPT, ids)
        prefill.ask("prefill", transfer=again.id, prompt="prompt", ids=ids)
        assert decode.result(request).outcome == "ok", "the same prefill serves again"
        assert decode.memory.wrong(PROMPT, ids) == []


def test_prefill_killed_mid_transfer_fails_the_pull_at_once(make_decode: MakeDecode) -> None:
    decode = make_decode(transport="tcp", memory=Memory(**BIG))
    ids = list(range(8))
    with RemoteSide("prefill", memory=BIG) as prefill:
        request = frozen_mid_transfer(decode, prefill, ids)
        started = time.monotonic()
        prefill.kill()
        result = decode.result(request)
    assert result.outcome != "ok" and set(result.bad_block_ids) == set(ids)
    assert time.monotonic() - started < 5, "noticed by the broken connection, not by a timeout"
    assert decode.memory.holds_only(ids, 0)


def test_decode_killed_mid_transfer_frees_at_once(make_prefill: MakePrefill) -> None:
    prefill = make_prefill(transport="tcp", memory=Memory(**BIG))
    with RemoteSide("decode", memory=BIG) as decode:
        ticket = prefill.ticket()
        decode.ask("stop_after", call="recv", nth=2)
        decode.begin(
            "pull", ticket={"id": ticket.id, "prefill": ticket.prefill, "addresses": ticket.addresses,
                            "expires_at": ticket.expires_at}, prompt="prompt", ids=list(range(8)),
        )  # fmt: skip
        prefill.prefill(ticket.id, PROMPT, range(8))
        decode.wait_frozen()
        assert not prefill.is_freed(ticket.id)
        started = time.monotonic()
        decode.kill()
        prefill.wait_freed(ticket.id)
        assert time.monotonic() - started < 5, "noticed by the broken connection, not by the lease"
    prefill.wait_quiet()


def test_decode_stopped_mid_transfer_frees_after_the_silence(make_prefill: MakePrefill) -> None:
    prefill = make_prefill(transport="tcp", memory=Memory(**BIG), options=HandoffOptions(peer_timeout_s=0.5))
    with RemoteSide("decode", memory=BIG, peer_timeout_s=0.5) as decode:
        ticket = prefill.ticket()
        decode.ask("stop_after", call="recv", nth=2)
        decode.begin(
            "pull", ticket={"id": ticket.id, "prefill": ticket.prefill, "addresses": ticket.addresses,
                            "expires_at": ticket.expires_at}, prompt="prompt", ids=list(range(8)),
        )  # fmt: skip
        prefill.prefill(ticket.id, PROMPT, range(8))
        decode.wait_frozen()
        prefill.wait_freed(ticket.id)
        prefill.memory.fill(range(8), 0x66)
        decode.resume()
        result = decode.ask("result", request=decode.answer())
        assert result["outcome"] != "ok" and set(result["bad_block_ids"]) == set(range(8))


# --- the engine's thread never waits ---------------------------------------------------------------------------------


def test_the_engines_thread_is_not_held_up_by_a_stuck_decode(
    make_prefill: MakePrefill, make_decode: MakeDecode, faults: Faults
) -> None:
    prefill, decode = make_prefill(transport="faulty"), make_decode(transport="faulty")
    gate = Gate(faults)
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.chunk(ticket.id, PROMPT, P_IDS, 0, 4)
    gate.wait_entered()
    started = time.monotonic()
    for _ in range(1000):
        prefill.service.begin_step(HandoffStep())
        prefill.service.layer_computed(0)
        prefill.service.end_step()
        prefill.service.take_finished()
        decode.service.start([])
        decode.service.cancel([])
        decode.service.take_results()
    assert time.monotonic() - started < 1.0
    gate.open()
    assert decode.result(request).outcome == "ok"


def test_bytes_are_counted_exactly_however_many_readers_there_are(
    make_prefill: MakePrefill, make_decode: MakeDecode
) -> None:
    prefill = make_prefill(transport="tcp")
    decode: DecodeSide = make_decode(transport="tcp", options=HandoffOptions(readers=8, read_bytes=4096))
    ticket = prefill.ticket()
    ids = list(range(64))
    request = decode.pull(ticket, PROMPT, ids)
    prefill.prefill(ticket.id, PROMPT, ids)
    result = decode.result(request)
    assert result.received_bytes == 64 * LAYERS * BLOCK_BYTES == decode.engine.metrics()["bytes_read"]
    assert isinstance(decode.service, PullService)
    assert np.all([decode.memory.wrong(PROMPT, ids) == []])
