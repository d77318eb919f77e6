"""Hand-offs end to end between real services and engines: right bytes, and the counters that prove how they came."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from mooncake_plugins.handoff import HandoffOptions, WatchState, sign_ticket
from tests.handoff.conftest import MakeDecode, MakePrefill
from tests.handoff.harness import BLOCK_BYTES, KEY, LAYERS, DecodeSide, Faults, Memory, PrefillSide, wait_until

P_IDS = [9, 3, 60, 31, 4]
D_IDS = [1, 50, 2, 49, 3]
PROMPT = b"prompt"


def has_length(items: list[int], length: int) -> bool:
    return len(items) == length


def assert_ok(prefill: PrefillSide, decode: DecodeSide, request: str, *, blocks: int = 5) -> None:
    """A pull went well, and the counters say that all of it came from prefill."""
    result = decode.result(request)
    assert (result.outcome, result.bad_block_ids, result.good_blocks) == ("ok", (), blocks)
    assert result.received_bytes == blocks * LAYERS * BLOCK_BYTES
    assert decode.service.counters["blocks_failed"] == decode.service.counters["checksum_mismatches"] == 0
    assert decode.service.live_transfers == 0


@pytest.mark.parametrize("transport", ["loopback", "tcp"])
def test_blocks_arrive_where_they_belong(make_prefill: MakePrefill, make_decode: MakeDecode, transport: str) -> None:
    prefill, decode = make_prefill(transport=transport), make_decode(transport=transport)
    decode.memory.fill(range(64), 0xEE)
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert_ok(prefill, decode, request)
    assert decode.memory.wrong(PROMPT, D_IDS) == []
    assert decode.memory.holds_only(set(range(64)) - set(D_IDS), 0xEE), "no other block was touched"
    prefill.wait_freed(ticket.id)
    prefill.wait_quiet()
    counters = decode.service.counters
    assert counters["bytes_received"] == 5 * LAYERS * BLOCK_BYTES == decode.engine.metrics()["bytes_read"]
    assert (counters["pulls"], counters["pulls_ok"], counters["blocks_loaded"]) == (1, 1, 5)
    assert counters[f"pulls_by_{transport}"] == 1
    assert prefill.service.counters["transfers_done"] == 1
    assert prefill.service.counters["commits_withheld"] == 0


def test_layers_are_pulled_while_later_ones_are_still_computed(
    make_prefill: MakePrefill, make_decode: MakeDecode, faults: Faults
) -> None:
    prefill, decode = make_prefill(transport="faulty"), make_decode(transport="faulty")
    reads: list[int] = []
    faults.after = lambda work: reads.append(work.total_bytes)
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.begin(ticket.id, PROMPT, P_IDS, 0, 5)
    for layer in range(LAYERS):
        prefill.compute(PROMPT, layer, P_IDS, 0, 5)
        wait_until(partial(has_length, reads, layer + 1), f"layer {layer} to be read")
        assert decode.memory.wrong(PROMPT, D_IDS) == [
            (later, i) for later in range(layer + 1, LAYERS) for i in range(5)
        ]
    prefill.service.end_step()
    assert_ok(prefill, decode, request)


def test_chunked_prefill_is_pulled_chunk_by_chunk(prefill: PrefillSide, decode: DecodeSide) -> None:
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.chunk(ticket.id, PROMPT, P_IDS, 0, 2)
    wait_until(lambda: prefill.service.counters["commits"], "something of the first chunk to be committed")
    assert not decode.has_result(request)
    prefill.chunk(ticket.id, PROMPT, P_IDS, 2, 4)
    prefill.chunk(ticket.id, PROMPT, P_IDS, 4, 5)
    assert_ok(prefill, decode, request)
    assert decode.memory.wrong(PROMPT, D_IDS) == []


def test_a_decode_worker_that_comes_late_is_caught_up_from_held_blocks(
    prefill: PrefillSide, decode: DecodeSide
) -> None:
    ticket = prefill.ticket()
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    request = decode.pull(ticket, PROMPT, D_IDS)
    assert_ok(prefill, decode, request)
    assert decode.memory.wrong(PROMPT, D_IDS) == []
    prefill.wait_freed(ticket.id)


def test_only_the_tail_is_pulled_when_decode_has_the_beginning(prefill: PrefillSide, decode: DecodeSide) -> None:
    ticket = prefill.ticket()
    decode.memory.fill(D_IDS[:3], 0xEE)
    request = decode.pull(ticket, PROMPT, D_IDS[3:], first=3)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert_ok(prefill, decode, request, blocks=2)
    assert decode.memory.wrong(PROMPT, D_IDS[3:], first=3) == []
    assert decode.memory.holds_only(D_IDS[:3], 0xEE)


def test_many_transfers_at_once_do_not_mix(make_prefill: MakePrefill, make_decode: MakeDecode) -> None:
    options = HandoffOptions(readers=4, read_bytes=2 * BLOCK_BYTES)
    prefill, decode = make_prefill(transport="tcp", options=options), make_decode(transport="tcp", options=options)
    tickets = [prefill.ticket() for _ in range(12)]
    prompts = [f"prompt {i}".encode() for i in range(12)]
    requests = [
        decode.pull(t, p, range(5 * i, 5 * i + 5)) for i, (t, p) in enumerate(zip(tickets, prompts, strict=True))
    ]
    for i, (ticket, prompt) in enumerate(zip(tickets, prompts, strict=True)):
        prefill.prefill(ticket.id, prompt, list(range(5 * i + 4, 5 * i - 1, -1)))
    for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        assert decode.result(request).outcome == "ok"
        assert decode.memory.wrong(prompt, range(5 * i, 5 * i + 5)) == []
    assert decode.service.counters["bytes_received"] == 12 * 5 * LAYERS * BLOCK_BYTES
    for ticket in tickets:
        prefill.wait_freed(ticket.id)


def test_two_prefills_and_two_decodes_share_nothing_but_the_network(
    make_prefill: MakePrefill, make_decode: MakeDecode
) -> None:
    prefills, decodes = [make_prefill() for _ in range(2)], [make_decode() for _ in range(2)]
    pulls = []
    for p, prefill in enumerate(prefills):
        for d, decode in enumerate(decodes):
            ticket, prompt = prefill.ticket(), f"{p} to {d}".encode()
            pulls.append((p, d, ticket, prompt, decode.pull(ticket, prompt, [10 * p, 10 * p + 1])))

    def compute(p: int) -> None:
        """What one engine's thread does."""
        for _, d, ticket, prompt, _ in pulls[2 * p : 2 * p + 2]:
            prefills[p].prefill(ticket.id, prompt, [20 * d, 20 * d + 1])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compute, range(2)))
    for p, d, _, prompt, request in pulls:
        assert decodes[d].result(request).outcome == "ok"
        assert decodes[d].memory.wrong(prompt, [10 * p, 10 * p + 1]) == []


@pytest.mark.parametrize("read_bytes", [4096, 3 * BLOCK_BYTES, 1 << 20])
def test_reads_are_cut_in_pieces_without_losing_any(
    make_decode: MakeDecode, prefill: PrefillSide, read_bytes: int
) -> None:
    decode = make_decode(options=HandoffOptions(read_bytes=read_bytes))
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert_ok(prefill, decode, request)
    assert decode.memory.wrong(PROMPT, D_IDS) == []


def test_the_last_block_may_be_partly_filled(prefill: PrefillSide, decode: DecodeSide) -> None:
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS, tokens=65)
    prefill.prefill(ticket.id, PROMPT, P_IDS, tokens=65)
    assert_ok(prefill, decode, request)


def test_caches_with_other_strides_but_equal_blocks_fit(make_decode: MakeDecode, prefill: PrefillSide) -> None:
    decode = make_decode(memory=Memory(pad=1000, blocks=70))
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, [69, 0, 68, 1, 67])
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert_ok(prefill, decode, request)
    assert decode.memory.wrong(PROMPT, [69, 0, 68, 1, 67]) == []


@pytest.mark.parametrize("memory", [Memory(block_bytes=8192), Memory(layers=3)], ids=["block bytes", "layers"])
def test_caches_that_do_not_fit_are_refused_with_both_shapes(
    make_decode: MakeDecode, prefill: PrefillSide, memory: Memory
) -> None:
    decode = make_decode(memory=memory)
    memory.fill(D_IDS, 0xEE)
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    result = decode.result(request)
    assert result.outcome.startswith("layout: 4 layers of 4096 bytes a block on prefill")
    assert f"{len(memory.places)} of {memory.block_bytes} on decode" in result.outcome
    assert set(result.bad_block_ids) == set(D_IDS) and memory.holds_only(D_IDS, 0)
    prefill.wait_freed(ticket.id)


# --- the scheduler's watcher -----------------------------------------------------------------------------------------


def test_the_watcher_learns_that_the_prefill_has_begun_before_any_block_is_computed(
    prefill: PrefillSide, decode: DecodeSide
) -> None:
    ticket = prefill.ticket()
    decode.watcher.watch(ticket, sign_ticket(ticket, KEY), PROMPT, 80)
    assert decode.watcher.state(ticket.id) is WatchState.ASKING
    prefill.begin(ticket.id, PROMPT, P_IDS, 0, 5)
    wait_until(lambda: decode.watcher.state(ticket.id) is WatchState.READY, "the watcher to be told")
    decode.watcher.end(ticket.id)
    request = decode.pull(ticket, PROMPT, D_IDS)
    for layer in range(LAYERS):
        prefill.compute(PROMPT, layer, P_IDS, 0, 5)
    prefill.service.end_step()
    prefill.hold(ticket.id)
    assert_ok(prefill, decode, request)
    prefill.wait_freed(ticket.id)


def test_a_watcher_that_declines_lets_prefill_free_its_blocks(prefill: PrefillSide, decode: DecodeSide) -> None:
    ticket = prefill.ticket()
    decode.watcher.watch(ticket, sign_ticket(ticket, KEY), PROMPT, 80)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    wait_until(lambda: decode.watcher.state(ticket.id) is WatchState.READY, "the watcher to be told")
    session = decode.watcher.end(ticket.id, release="short")
    assert session is not None and session.state is WatchState.READY
    prefill.wait_freed(ticket.id)
    prefill.wait_quiet()


def test_many_requests_share_one_channel(prefill: PrefillSide, decode: DecodeSide) -> None:
    tickets = [prefill.ticket() for _ in range(20)]
    for ticket in tickets:
        decode.watcher.watch(ticket, sign_ticket(ticket, KEY), PROMPT, 80)
    for ticket in tickets:
        prefill.begin(ticket.id, PROMPT, P_IDS, 0, 5)
    wait_until(lambda: all(decode.watcher.state(t.id) is WatchState.READY for t in tickets), "all to be told")
    assert prefill.engine.metrics()["connections_in"] == 1


def test_what_is_not_watched_is_declined(decode: DecodeSide) -> None:
    assert decode.watcher.state("0" * 32) is WatchState.DECLINED
    assert decode.watcher.end("0" * 32, release="x") is None


def test_the_watcher_gives_up_when_prefill_does_not_begin(make_decode: MakeDecode, prefill: PrefillSide) -> None:
    decode = make_decode(options=HandoffOptions(watch_timeout_s=0.2))
    ticket = prefill.ticket()
    decode.watcher.watch(ticket, sign_ticket(ticket, KEY), PROMPT, 80)
    wait_until(lambda: decode.watcher.state(ticket.id) is WatchState.DECLINED, "the watcher to give up")
    session = decode.watcher.end(ticket.id, release="declined")
    assert session is not None and session.reason == "deadline"


# --- the end of the services -----------------------------------------------------------------------------------------


def test_closing_ends_all_threads_in_the_middle_of_a_transfer(
    make_prefill: MakePrefill, make_decode: MakeDecode, faults: Faults
) -> None:
    """`leak_check` fails the test if a thread or a descriptor is left."""
    prefill, decode = make_prefill(transport="faulty"), make_decode(transport="faulty")
    entered, leave = threading.Event(), threading.Event()

    def hold(work: object) -> None:
        entered.set()
        leave.wait(10)

    faults.before = hold
    ticket = prefill.ticket()
    request = decode.pull(ticket, PROMPT, D_IDS)
    prefill.prefill(ticket.id, PROMPT, P_IDS)
    assert entered.wait(10)
    threading.Timer(0.1, leave.set).start()
    decode.close()
    prefill.close()
    assert not decode.has_result(request)
    for side in (decode, prefill):
        side.close()


def test_services_that_were_never_used_close(prefill: PrefillSide, decode: DecodeSide) -> None:
    pass
