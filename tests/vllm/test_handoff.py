"""Both engines' schedulers, our whole connector, real sockets; only the model is arithmetic (see ``modelless``)."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from mooncake_plugins.handoff import sign_ticket
from tests.vllm.modelless import BLOCK, LAYERS, ModellessEngine, Pair, expected_tokens, params

BLOCK_BYTES = LAYERS * BLOCK * 8


def prompt_of(count: int, seed: object = 0) -> list[int]:
    draw = random.Random(f"{seed}/{count}")
    return [draw.randrange(3, 280) for _ in range(count)]


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK)


@pytest.mark.parametrize("tokens", [2, 31, 32, 33, 64, 65, 128, 300])
def test_tokens_equal_an_engine_alone_and_the_kv_came_from_prefill(pair: Pair, tokens: int) -> None:
    prompt = prompt_of(tokens)
    _, request = pair.add(prompt, max_tokens=5)
    pair.run()
    assert pair.decode.outputs[request.request_id] == expected_tokens(prompt, 5)
    counts = pair.decode.counts
    assert counts["blocks_loaded"] == blocks_of(tokens)
    assert counts["bytes_received"] == blocks_of(tokens) * BLOCK_BYTES
    assert counts["pulls_ok"] == 1 and counts["pulls_failed"] == 0
    # Decode computed one token of the prompt and what it answered; nothing else.
    assert sum(step.total_num_scheduled_tokens for step in pair.decode.steps) == 5


def test_one_token_prompts_are_computed_where_they_are_answered(pair: Pair) -> None:
    prompt = prompt_of(1)
    _, request = pair.add(prompt)
    pair.run()
    assert pair.decode.outputs[request.request_id] == expected_tokens(prompt, 4)
    assert pair.decode.counts["computed_here_short"] == 1
    assert pair.decode.counts["pulls"] == 0


def test_chunks_announce_whole_blocks_and_the_partial_one_only_at_the_end(pair: Pair) -> None:
    """100 tokens in chunks of 40: after each, only blocks that are full are ready, and at last the one that is not."""
    pair.prefill.scheduler.max_num_scheduled_tokens = 40
    _, request = pair.add(prompt_of(100))
    pair.run()
    work = [one for step in pair.prefill.steps for one in step.kv_connector_metadata.step.work]
    assert [one.blocks_after for one in work] == [1, 2, 4]
    assert [one.is_first for one in work] == [True, False, False]
    assert sum(len(one.block_ids) for one in work) == 4
    assert pair.decode.outputs[request.request_id] == expected_tokens(prompt_of(100), 4)


def test_prefixes_cached_on_either_side_are_not_moved_twice(pair: Pair) -> None:
    common = prompt_of(4 * BLOCK, "common")
    for engine, cached in ((pair.prefill, 4), (pair.decode, 2)):
        engine.add([*common[: cached * BLOCK], 7], max_tokens=1)
    pair.run()
    prompt = [*common, *prompt_of(50, "rest")]
    _, request = pair.add(prompt)
    pair.run()
    assert pair.decode.outputs[request.request_id] == expected_tokens(prompt, 4)
    assert pair.decode.counts["blocks_loaded"] == blocks_of(len(prompt)) - 2
    assert pair.prefill.counts["blocks_cached"] == 4


def test_a_prompt_cached_whole_on_decode_needs_no_pull(pair: Pair) -> None:
    prompt = prompt_of(2 * BLOCK + 1)
    pair.decode.add(prompt, max_tokens=1)
    pair.run()
    _, request = pair.add(prompt)
    pair.run()
    assert pair.decode.outputs[request.request_id] == expected_tokens(prompt, 4)
    assert pair.decode.counts["computed_here_short"] == 1


def test_preempted_prefill_begins_again(pair: Pair) -> None:
    """The engine takes the blocks of a half computed prompt, fills them with others' KV, and computes it again."""
    prompt, other = prompt_of(300, "preempted"), prompt_of(200, "other")
    _, request = pair.add(prompt, max_tokens=6)
    pair.run(lambda: len(pair.prefill.steps) >= 2)
    pair.prefill.preempt_all()
    pair.prefill.add(other, max_tokens=1)
    pair.run()
    preempted = [t for step in pair.prefill.steps for t in step.kv_connector_metadata.step.preempted]
    assert len(preempted) == 1
    assert pair.decode.outputs[request.request_id] == expected_tokens(prompt, 6)
    assert pair.decode.counts["pulls_ok"] == 1


def test_preempted_decode_computes_its_prompt_itself(pair: Pair) -> None:
    """What was loaded is lost with the blocks; the ticket is used up."""
    prompt = prompt_of(100, "preempted on decode")
    _, request = pair.add(prompt, max_tokens=8)
    pair.run(lambda: len(pair.decode.outputs[request.request_id]) >= 2)
    pair.decode.preempt_all()
    pair.run()
    assert pair.decode.outputs[request.request_id] == expected_tokens(prompt, 8)
    assert pair.decode.counts["pulls"] == 1


def test_siblings_of_one_call_pull_once(pair: Pair) -> None:
    """``n > 1``: the engine names the children ``0_x``, ``1_x``; all carry the one ticket."""

    prompt = prompt_of(150, "siblings")
    text = sign_ticket(pair.prefill.ticket(), b"")
    pair.prefill.add(prompt, params("prefill", text), max_tokens=1)
    children = [pair.decode.add(prompt, params("decode", text), request_id=f"{i}_call-{id(pair)}") for i in range(3)]
    pair.run()
    for child in children:
        assert pair.decode.outputs[child.request_id] == expected_tokens(prompt, 4)
    assert pair.decode.counts["pulls_ok"] == 1
    assert not any(name.startswith("tickets_refused") for name in pair.decode.counts)


def test_siblings_whose_owner_was_aborted_compute_for_themselves(pair: Pair) -> None:

    prompt = prompt_of(90, "orphans")
    text = sign_ticket(pair.prefill.ticket(), b"")
    owner, orphan = (
        pair.decode.add(prompt, params("decode", text), request_id=f"{i}_orphan-{id(pair)}") for i in range(2)
    )
    pair.decode.step()
    assert pair.decode.outputs[orphan.request_id] == []
    pair.decode.abort(owner)
    pair.run()
    assert pair.decode.outputs[orphan.request_id] == expected_tokens(prompt, 4)


def test_prompt_logprobs_are_computed_where_they_are_answered(pair: Pair) -> None:
    prompt = prompt_of(80, "logprobs")
    _, request = pair.add(prompt, prompt_logprobs=0)
    pair.run()
    assert pair.decode.outputs[request.request_id] == expected_tokens(prompt, 4)
    assert pair.decode.counts["computed_here_prompt_logprobs"] == 1
    assert pair.decode.counts["pulls"] == 0


# --- failures ----------------------------------------------------------------------------------------------------


def break_bytes(pair: Pair) -> None:
    """Change prefill's KV behind the connector's back, between a read and its checksum."""
    source = pair.prefill.worker._work._source
    original = source._checksums

    def checksums(transfer: str, span: Any) -> Any:
        pair.prefill.cache[:, list(span.block_ids)] ^= 1
        return original(transfer, span)

    source._checksums = checksums


def test_a_failed_load_is_computed_again_and_not_asked_again(pair: Pair) -> None:
    break_bytes(pair)
    prompt = prompt_of(200, "failed")
    _, request = pair.add(prompt)
    pair.run()
    assert pair.decode.outputs[request.request_id] == expected_tokens(prompt, 4)
    counts = pair.decode.counts
    assert counts["pulls_failed"] == 1 and counts["checksum_mismatches"] >= 1
    assert pair.decode.side.get_num_new_matched_tokens(request, 0) == (0, False)


def test_blocks_of_a_failed_load_are_zero_before_anyone_gets_them(pair: Pair) -> None:
    break_bytes(pair)
    pair.add(prompt_of(200, "zeroed"))
    seen: list[bool] = []

    def look() -> None:
        for bad in pair.decode.worker._work._bad_blocks:
            seen.append(not pair.decode.cache[:, bad].any())

    original = pair.decode.worker.get_finished

    def get_finished(ids: set[str]) -> Any:
        results = original(ids)
        look()
        return results

    pair.decode.worker.get_finished = get_finished
    pair.run()
    assert len(seen) == blocks_of(200) and all(seen)


def test_dead_prefill_is_given_up(make_engine: Any) -> None:
    prefill, decode = make_engine("kv_producer"), make_engine("kv_consumer")
    pair = Pair(prefill, decode)
    prompt = prompt_of(100, "dead")
    ticket = prefill.ticket(addresses={"0,0": "127.0.0.1:9"})
    _, request = pair.add(prompt, ticket=ticket)
    pair.run(lambda: not decode.scheduler.requests)
    assert decode.outputs[request.request_id] == expected_tokens(prompt, 4)
    assert decode.counts["computed_here_unreachable"] == 1
    # Nobody will ever ask prefill for these blocks: it holds them until its lease is over.
    assert not prefill.is_idle


def test_a_lease_nobody_asks_for_ends(make_engine: Any) -> None:
    prefill = make_engine("kv_producer", extra={"lease_s": 0.3})
    pair = Pair(prefill, make_engine("kv_consumer"))

    prefill.add(prompt_of(100, "lease"), params("prefill", sign_ticket(prefill.ticket(), b"")), max_tokens=1)
    pair.run(lambda: bool(prefill.steps) and prefill.is_idle)
    assert prefill.counts["transfers_withdrawn"] == 1


def test_prefill_that_never_begins_is_given_up(make_engine: Any) -> None:
    pair = Pair(make_engine("kv_producer"), make_engine("kv_consumer", extra={"watch_timeout_s": 0.3}))

    prompt = prompt_of(60, "never")
    request = pair.decode.add(prompt, params("decode", sign_ticket(pair.prefill.ticket(), b"")))
    pair.run()
    assert pair.decode.outputs[request.request_id] == expected_tokens(prompt, 4)
    assert pair.decode.counts["computed_here_deadline"] == 1


@pytest.mark.parametrize("other", ["shorter", "different"])
def test_another_prompt_than_prefill_has_is_refused(pair: Pair, other: str) -> None:

    mine = prompt_of(100, "mine")
    theirs = mine[:90] if other == "shorter" else prompt_of(100, "theirs")
    text = sign_ticket(pair.prefill.ticket(), b"")
    pair.prefill.add(theirs, params("prefill", text), max_tokens=1)
    request = pair.decode.add(mine, params("decode", text))
    pair.run()
    assert pair.decode.outputs[request.request_id] == expected_tokens(mine, 4)
    assert pair.decode.counts["computed_here_prompt"] == 1


# --- aborts ------------------------------------------------------------------------------------------------------


def test_abort_while_asking_frees_both_sides(pair: Pair) -> None:
    first, request = pair.add(prompt_of(100, "asking"))
    pair.decode.step()
    pair.decode.abort(request)
    pair.run()
    assert pair.decode.outputs[request.request_id] == []
    assert len(pair.prefill.outputs[first.request_id]) == 1


def test_abort_while_loading_is_reported_once(pair: Pair) -> None:
    _, request = pair.add(prompt_of(300, "loading"))
    pair.run(lambda: pair.decode.counts["tokens_requested"] > 0)
    pair.decode.abort(request)
    pair.run()
    assert pair.decode.outputs[request.request_id] == []
    assert pair.decode.counts["pulls"] == 1


def test_abort_of_the_prefill_leg_makes_decode_compute(pair: Pair) -> None:
    prompt = prompt_of(400, "aborted prefill")
    first, request = pair.add(prompt)
    pair.run(lambda: len(pair.prefill.steps) >= 2)
    pair.prefill.abort(first)
    pair.run()
    assert pair.decode.outputs[request.request_id] == expected_tokens(prompt, 4)
    assert pair.prefill.counts["prefills_aborted"] == 1


def test_abort_of_the_prefill_leg_after_its_end_changes_nothing(pair: Pair) -> None:
    prompt = prompt_of(64, "late abort")
    first, request = pair.add(prompt)
    pair.run(lambda: len(pair.prefill.outputs[first.request_id]) == 1)
    pair.prefill.abort(first)
    pair.run()
    assert pair.decode.outputs[request.request_id] == expected_tokens(prompt, 4)


# --- many at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_many_requests_in_few_blocks(make_engine: Any, seed: int) -> None:
    """Mixed lengths, shared prefixes, aborts and preemptions; right tokens, and every block free at the end."""
    draw = random.Random(seed)
    pair = Pair(
        make_engine("kv_both", blocks=24, max_num_seqs=4, scheduler_reserve_full_isl=False),
        make_engine("kv_both", blocks=20, max_num_seqs=4, scheduler_reserve_full_isl=False),
    )
    wanted: dict[str, list[int]] = {}
    aborts: list[tuple[int, ModellessEngine, Any]] = []
    common = prompt_of(3 * BLOCK, "shared")
    for number in range(14):
        prompt = common[: draw.choice([0, 40, 96])] + prompt_of(draw.randrange(1, 200), (seed, number))
        first, second = pair.add(prompt, max_tokens=draw.randrange(1, 30))
        wanted[second.request_id] = expected_tokens(prompt, second.max_tokens)
        local = draw.choice([pair.prefill, pair.decode]).add(
            prompt_of(draw.randrange(1, 90), number), max_tokens=draw.randrange(2, 60)
        )
        assert local.request_id
        if draw.random() < 0.3:
            leg, engine = draw.choice([(first, pair.prefill), (second, pair.decode)])
            aborts.append((draw.randrange(1, 60), engine, leg))
            if leg is second:
                del wanted[second.request_id]
    rounds = 0

    def is_done() -> bool:
        nonlocal rounds
        rounds += 1
        for when, engine, leg in aborts:
            if when == rounds:
                engine.abort(leg)
        if rounds in (8, 30):
            draw.choice([pair.prefill, pair.decode]).preempt_all()
        return rounds > 60 and pair.prefill.is_idle and pair.decode.is_idle

    pair.run(is_done)
    assert {one: pair.decode.outputs[one] for one in wanted} == wanted
    counts = pair.decode.counts
    assert counts["pulls_ok"] > 0 and counts["checksum_mismatches"] == 0


def test_describe_answers_what_the_engine_is(pair: Pair) -> None:
    request = pair.prefill.add([5], params("describe"), max_tokens=1)
    pair.run()
    answer = pair.prefill.answers[request.request_id]["mooncake"]
    assert answer["instance"] == pair.prefill.instance
    assert answer["role"] == "prefill"
    assert answer["addresses"] == pair.prefill.addresses
    assert answer["fingerprint"]["block_size"] == BLOCK


def test_time_is_measured(pair: Pair) -> None:
    begun = time.monotonic()
    pair.add(prompt_of(300, "time"))
    pair.run()
    ((seconds, exposed),) = pair.decode.durations
    assert 0 < exposed <= seconds < time.monotonic() - begun
