"""The prefill side's state machine while it serves: announcing, committing, restarting; one behaviour a test."""

from __future__ import annotations

import numpy as np
import pytest

from mooncake_plugins.handoff import _messages as wire
from mooncake_plugins.handoff import _source as machine
from mooncake_plugins.handoff._source import SourceState
from tests.handoff.source_driver import (
    ALL,
    EXPIRES_AT,
    IDS,
    LAYERS,
    LEASE_S,
    OTHER,
    PROMPT,
    SCHEDULER,
    TOKENS,
    WORKER,
    Driver,
    cells,
    forgotten,
    frees,
    hashed,
    readies,
    refusals,
)


@pytest.fixture
def d() -> Driver:
    return Driver()


# --- announcing ------------------------------------------------------------------------------------------------------


def test_layers_are_announced_one_by_one_as_they_are_computed(d: Driver) -> None:
    d.schedule()
    assert d.attach() == [machine.TellLayout(WORKER, 0)]
    for layer in range(LAYERS):
        actions = d.compute(4, layer, layer + 1)
        assert cells(actions) == [(layer, place, IDS[place]) for place in range(4)]
        assert len(readies(actions)) == 1


def test_a_whole_forward_is_announced_as_one_rectangle(d: Driver) -> None:
    d.schedule()
    d.attach()
    (ready,) = readies(d.compute(4))
    assert ready == wire.Ready("t", 0, 1, 0, LAYERS, 0, list(IDS))


def test_what_was_announced_layer_by_layer_is_not_announced_again_at_the_end_of_the_step(d: Driver) -> None:
    d.schedule()
    d.attach()
    for layer in range(LAYERS):
        d.compute(4, layer, layer + 1)
    assert d.compute(4) == []


def test_layers_without_a_hook_are_announced_at_the_end_of_the_step(d: Driver) -> None:
    d.schedule()
    d.attach()
    d.compute(4, 1, 2)
    assert cells(d.compute(4)) == [cell for cell in ALL if cell[0] != 1]


def test_chunks_announce_only_what_they_add(d: Driver) -> None:
    d.schedule(IDS[:2])
    d.attach()
    assert {place for _, place, _ in cells(d.compute(1))} == {0}
    assert {place for _, place, _ in cells(d.compute(2))} == {1}
    d.do(machine.Extended(IDS[2:]))
    assert {place for _, place, _ in cells(d.compute(4))} == {2, 3}
    assert sorted(cells(d.actions)) == ALL


def test_a_step_that_completes_no_block_announces_nothing(d: Driver) -> None:
    d.schedule()
    d.attach()
    assert d.compute(0) == []
    d.compute(2)
    assert d.compute(2) == []


def test_a_partly_filled_last_block_is_announced_only_when_the_engine_counts_it(d: Driver) -> None:
    d.schedule()
    d.attach()
    assert {place for _, place, _ in cells(d.compute(3))} == {0, 1, 2}
    assert {place for _, place, _ in cells(d.compute(4))} == {3}


def test_a_count_beyond_the_blocks_that_are_known_announces_those_and_the_rest_later(d: Driver) -> None:
    d.schedule(IDS[:2])
    d.attach()
    assert {place for _, place, _ in cells(d.compute(4))} == {0, 1}
    d.do(machine.Extended(IDS[2:]))
    assert {place for _, place, _ in cells(d.compute(4))} == {2, 3}


def test_blocks_of_the_prefix_cache_are_announced_with_the_layer_that_proves_them(d: Driver) -> None:
    """A block counts as cached from the moment its request is scheduled: it may be filled in the same step."""
    d.attach()
    assert readies(d.schedule()) == []
    assert cells(d.compute(4, 0, 1)) == [(0, place, IDS[place]) for place in range(4)]


def test_only_blocks_from_the_first_wanted_one_are_announced(d: Driver) -> None:
    d.schedule()
    d.attach(first_block=2)
    assert sorted(cells(d.compute(3)) + cells(d.compute(4))) == [cell for cell in ALL if cell[1] >= 2]


def test_nothing_is_announced_while_the_prefill_has_only_what_decode_has(d: Driver) -> None:
    d.schedule()
    d.attach(first_block=2)
    assert d.compute(2) == []


def test_who_attaches_late_is_caught_up(d: Driver) -> None:
    d.schedule()
    d.compute(2)
    d.compute(4, 0, 1)
    actions = d.attach()
    assert actions[0] == machine.TellLayout(WORKER, 0)
    assert sorted(cells(actions)) == [cell for cell in ALL if cell[0] == 0 or cell[1] < 2]


def test_who_attaches_after_the_prefill_has_ended_is_caught_up_from_the_held_blocks(d: Driver) -> None:
    d.schedule()
    d.compute(4)
    d.do(machine.PrefillEnded(ok=True))
    assert sorted(cells(d.attach())) == ALL


def test_who_attaches_before_the_prefill_begins_gets_the_layout_at_once_and_blocks_later(d: Driver) -> None:
    assert d.attach() == [machine.TellLayout(WORKER, 0)]
    assert d.schedule() == []
    assert sorted(cells(d.compute(4))) == ALL


def test_sequence_numbers_never_come_again(d: Driver) -> None:
    d.schedule()
    d.attach()
    d.compute(2)
    d.do(machine.Preempted())
    d.schedule()
    d.compute(4)
    numbers = [ready.seq for ready in readies(d.actions)]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(("layers", "blocks"), [(1, 1), (80, 100), (3, 511), (3, 512), (3, 513), (2, 2000), (600, 1)])
def test_a_large_rectangle_is_announced_in_spans_of_bounded_size_layer_by_layer(layers: int, blocks: int) -> None:
    d = Driver(layers)
    d.schedule(range(blocks))
    d.attach()
    actions = d.compute(blocks, 0, layers)
    assert cells(actions) == [(layer, place, place) for layer in range(layers) for place in range(blocks)]
    sizes = [(ready.layer1 - ready.layer0) * len(ready.block_ids) for ready in readies(actions)]
    assert max(sizes) <= 512 and len(sizes) <= layers * blocks // 256 + 1 + layers * (blocks > 512)


def test_computed_layers_mean_nothing_without_a_running_attempt(d: Driver) -> None:
    d.attach()
    assert d.compute(4) == []
    d.schedule()
    d.compute(1)
    d.do(machine.PrefillEnded(ok=True))
    assert d.compute(4) == []


# --- committing ------------------------------------------------------------------------------------------------------


def test_a_span_is_hashed_when_it_was_fetched_and_then_committed(d: Driver) -> None:
    d.schedule()
    d.attach()
    (ready,) = readies(d.compute(4))
    (job,) = d.do(machine.Fetched(WORKER, 0, ready.seq))
    assert isinstance(job, machine.HashSpan)
    assert (job.span.layer0, job.span.layer1, job.span.block0, job.span.block_ids) == (0, LAYERS, 0, IDS)
    (told,) = d.do(hashed(job))
    expected = np.arange(12, dtype="<u8").tobytes()
    assert told == machine.Tell(WORKER, wire.Commit("t", 0, ready.seq, expected))


def test_a_span_is_committed_once_however_often_it_is_said_to_be_fetched(d: Driver) -> None:
    d.schedule()
    d.attach()
    (ready,) = readies(d.compute(4))
    fetched = machine.Fetched(WORKER, 0, ready.seq)
    (job,) = d.do(fetched)
    assert d.do(fetched) == []
    d.do(hashed(job))
    assert d.do(fetched, hashed(job)) == []


def test_only_the_worker_that_attached_can_fetch(d: Driver) -> None:
    d.schedule()
    d.watch()
    d.attach()
    (ready,) = readies(d.compute(4))
    assert d.do(machine.Fetched(SCHEDULER, 0, ready.seq), machine.Fetched(OTHER, 0, ready.seq)) == []


def test_what_was_never_announced_cannot_be_fetched(d: Driver) -> None:
    d.schedule()
    d.attach()
    assert d.do(machine.Fetched(WORKER, 0, 1), machine.Fetched(WORKER, 0, -1)) == []


def test_nothing_is_committed_after_the_worker_has_gone(d: Driver) -> None:
    d.schedule()
    d.attach()
    (ready,) = readies(d.compute(4))
    (job,) = d.do(machine.Fetched(WORKER, 0, ready.seq))
    d.do(machine.LinkLost(WORKER))
    assert d.do(hashed(job)) == []


def test_nothing_is_committed_after_the_end(d: Driver) -> None:
    d.schedule()
    d.attach()
    (ready,) = readies(d.compute(4))
    (job,) = d.do(machine.Fetched(WORKER, 0, ready.seq))
    d.do(machine.PrefillEnded(ok=True))
    d.tick(LEASE_S)
    assert d.do(hashed(job), machine.Fetched(WORKER, 0, ready.seq)) == []


# --- preemption ------------------------------------------------------------------------------------------------------


def test_preemption_tells_the_worker_to_begin_again_and_announces_everything_again(d: Driver) -> None:
    d.schedule()
    d.attach()
    d.compute(3)
    assert d.do(machine.Preempted()) == [machine.Tell(WORKER, wire.Restarted("t", 1))]
    again = (50, 51, 52, 53)
    assert d.schedule(again) == []
    assert cells(d.compute(4)) == [(layer, place, again[place]) for layer in range(LAYERS) for place in range(4)]
    assert all(ready.attempt == 1 for ready in readies(d.actions[-1:]))


def test_what_was_fetched_before_a_preemption_is_never_committed(d: Driver) -> None:
    d.schedule()
    d.attach()
    (ready,) = readies(d.compute(4))
    (job,) = d.do(machine.Fetched(WORKER, 0, ready.seq))
    d.do(machine.Preempted())
    assert d.do(hashed(job)) == []
    d.schedule()
    assert d.do(hashed(job), machine.Fetched(WORKER, 0, ready.seq), machine.Fetched(WORKER, 1, ready.seq)) == []


def test_layers_that_were_computed_before_a_preemption_count_for_nothing(d: Driver) -> None:
    d.schedule()
    d.attach()
    d.compute(4)
    d.do(machine.Preempted())
    d.schedule()
    assert {place for _, place, _ in cells(d.compute(1))} == {0}


def test_a_preemption_that_nobody_watches_is_silent(d: Driver) -> None:
    d.schedule()
    assert d.do(machine.Preempted()) == []
    d.schedule()
    assert d.attach()[0] == machine.TellLayout(WORKER, 1)


def test_a_preemption_without_a_running_attempt_changes_nothing(d: Driver) -> None:
    assert d.do(machine.Preempted()) == []
    d.schedule()
    d.compute(4)
    d.do(machine.PrefillEnded(ok=True))
    assert d.do(machine.Preempted()) == []
    assert d.source.state is SourceState.HELD


def test_a_preempted_prefill_does_not_expire_with_its_ticket(d: Driver) -> None:
    d.schedule()
    d.do(machine.Preempted())
    assert d.tick(EXPIRES_AT + 1) == []
    assert d.source.state is SourceState.EXPECTED


def test_who_attached_with_a_first_block_gets_from_there_after_a_preemption(d: Driver) -> None:
    d.schedule()
    d.attach(first_block=3)
    d.compute(4)
    d.do(machine.Preempted())
    d.schedule()
    assert {place for _, place, _ in cells(d.compute(4))} == {3}


# --- watching --------------------------------------------------------------------------------------------------------


def test_a_watcher_is_told_when_the_prefill_begins(d: Driver) -> None:
    assert d.watch() == []
    assert d.schedule() == [machine.Tell(SCHEDULER, wire.Scheduled("t"))]


@pytest.mark.parametrize("ended", [False, True])
def test_a_late_watcher_is_told_at_once(d: Driver, ended: bool) -> None:
    d.schedule()
    if ended:
        d.do(machine.PrefillEnded(ok=True))
    assert d.watch() == [machine.Tell(SCHEDULER, wire.Scheduled("t"))]


def test_a_watcher_with_another_prompt_is_refused_and_the_blocks_are_freed_at_the_end(d: Driver) -> None:
    d.do(machine.Watched(SCHEDULER, b"other", TOKENS))
    assert refusals(d.schedule()) == [(SCHEDULER, "prompt")]
    actions = d.do(machine.PrefillEnded(ok=True))
    assert frees(actions) == 1 and forgotten(actions) == ["done"]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(("prompt", "tokens"), [(b"other", TOKENS), (PROMPT, TOKENS + 1)])
def test_a_worker_with_another_prompt_is_refused(d: Driver, early: bool, prompt: bytes, tokens: int) -> None:
    attach = machine.Attached(WORKER, prompt, tokens, 0)
    if early:
        d.do(attach)
        actions = d.schedule()
    else:
        d.schedule()
        actions = d.do(attach)
    assert refusals(actions) == [(WORKER, "prompt")]
    assert d.compute(4) == []
    assert frees(d.do(machine.PrefillEnded(ok=True))) == 1


def test_the_refusal_of_another_prompt_names_both_lengths(d: Driver) -> None:
    d.schedule()
    (told, *_) = d.do(machine.Attached(WORKER, b"other", 7, 0))
    assert isinstance(told, machine.Tell) and isinstance(told.message, wire.Refused)
    assert "(7 tokens)" in told.message.detail and f"({TOKENS} tokens)" in told.message.detail
