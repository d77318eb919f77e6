"""The prefill side's state machine: one behaviour a test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mooncake_plugins.handoff import _messages as wire
from mooncake_plugins.handoff import _source as machine
from mooncake_plugins.handoff._source import PrefillSource, SourceState

LAYERS = 3
LEASE_S = 60.0
EXPIRES_AT = 100.0
SCHEDULER, WORKER, OTHER = 1, 2, 3
PROMPT, TOKENS = b"prompt", 50
IDS = (40, 41, 42, 43)

Cell = tuple[int, int, int]


class Driver:
    """Feeds a ``PrefillSource`` and keeps what it did."""

    def __init__(self, layers: int = LAYERS) -> None:
        self.source = PrefillSource("t", layers, expires_at=EXPIRES_AT, lease_s=LEASE_S)
        self.now = 0.0
        self.actions: list[machine.SourceAction] = []

    def do(self, *events: machine.SourceEvent) -> list[machine.SourceAction]:
        """What these events make it do."""
        fresh = [action for event in events for action in self.source.handle(event, self.now)]
        self.actions += fresh
        return fresh

    def schedule(self, ids: Sequence[int] = IDS) -> list[machine.SourceAction]:
        return self.do(machine.Scheduled(PROMPT, TOKENS, tuple(ids)))

    def attach(self, link: int = WORKER, first_block: int = 0) -> list[machine.SourceAction]:
        return self.do(machine.Attached(link, PROMPT, TOKENS, first_block))

    def watch(self, link: int = SCHEDULER) -> list[machine.SourceAction]:
        return self.do(machine.Watched(link, PROMPT, TOKENS))

    def compute(self, blocks: int, layer0: int = 0, layer1: int = LAYERS) -> list[machine.SourceAction]:
        return self.do(machine.Computed(layer0, layer1, blocks))

    def tick(self, now: float) -> list[machine.SourceAction]:
        self.now = now
        return self.do(machine.Tick())

    def commit_all(self) -> list[machine.SourceAction]:
        """Fetch and hash everything that was announced."""
        done: list[machine.SourceAction] = []
        for message in readies(self.actions):
            hashes = self.do(machine.Fetched(WORKER, message.attempt, message.seq))
            done += [action for job in hashes for action in self.do(hashed(job))]
        return done


@pytest.fixture
def d() -> Driver:
    return Driver()


def readies(actions: Sequence[machine.SourceAction]) -> list[wire.Ready]:
    return [a.message for a in actions if isinstance(a, machine.Tell) and isinstance(a.message, wire.Ready)]


def cells(actions: Sequence[machine.SourceAction]) -> list[Cell]:
    """``(layer, place in the sequence, physical block)`` of everything that was announced, in order."""
    found = []
    for ready in readies(actions):
        for layer in range(ready.layer0, ready.layer1):
            found += [(layer, ready.block0 + i, block_id) for i, block_id in enumerate(ready.block_ids)]
    return found


def hashed(action: machine.SourceAction) -> machine.Hashed:
    assert isinstance(action, machine.HashSpan)
    count = (action.span.layer1 - action.span.layer0) * len(action.span.block_ids)
    return machine.Hashed(action.attempt, action.span.seq, np.arange(count, dtype=np.uint64))


def refusals(actions: Sequence[machine.SourceAction]) -> list[tuple[int, str]]:
    return [
        (a.link, a.message.reason)
        for a in actions
        if isinstance(a, machine.Tell) and isinstance(a.message, wire.Refused)
    ]


def withdrawals(actions: Sequence[machine.SourceAction]) -> list[tuple[int, str]]:
    tells = [a for a in actions if isinstance(a, machine.Tell)]
    return [(a.link, a.message.reason) for a in tells if isinstance(a.message, wire.Withdrawn)]


def frees(actions: Sequence[machine.SourceAction]) -> int:
    return sum(isinstance(action, machine.FreeBlocks) for action in actions)


def forgotten(actions: Sequence[machine.SourceAction]) -> list[str]:
    return [action.reason for action in actions if isinstance(action, machine.Forget)]


ALL = [(layer, place, IDS[place]) for layer in range(LAYERS) for place in range(len(IDS))]

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


# --- one consumer ----------------------------------------------------------------------------------------------------


def test_a_second_worker_is_refused_and_the_first_goes_on(d: Driver) -> None:
    d.schedule()
    d.attach()
    assert refusals(d.attach(OTHER)) == [(OTHER, "reused")]
    assert d.do(machine.Released(OTHER), machine.LinkLost(OTHER)) == []
    assert all(isinstance(a, machine.Tell) and a.link == WORKER for a in d.compute(4))


def test_a_second_worker_is_refused_also_when_the_first_has_gone(d: Driver) -> None:
    d.schedule()
    d.attach()
    d.compute(2)
    d.do(machine.LinkLost(WORKER))
    assert refusals(d.attach(OTHER)) == [(OTHER, "reused")]


def test_a_worker_is_served_although_its_scheduler_has_gone_before_it_came(d: Driver) -> None:
    d.schedule()
    d.watch()
    d.do(machine.LinkLost(SCHEDULER))
    assert d.attach() == [machine.TellLayout(WORKER, 0)]
    assert sorted(cells(d.compute(4))) == ALL
    assert frees(d.do(machine.PrefillEnded(ok=True))) == 0


def test_a_stranger_who_leaves_or_releases_changes_nothing(d: Driver) -> None:
    d.schedule()
    d.do(machine.Released(OTHER), machine.LinkLost(OTHER))
    d.compute(4)
    d.do(machine.PrefillEnded(ok=True), machine.Released(OTHER), machine.LinkLost(OTHER))
    assert d.source.state is SourceState.HELD


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [machine.Released(WORKER), machine.LinkLost(WORKER)])
def test_blocks_are_freed_as_soon_as_the_worker_needs_nothing_more(d: Driver, event: machine.SourceEvent) -> None:
    d.schedule()
    d.attach()
    d.compute(4)
    d.commit_all()
    d.do(machine.PrefillEnded(ok=True))
    actions = d.do(event)
    assert frees(actions) == 1 and forgotten(actions) == ["done"]
    assert frees(d.do(event, machine.Tick())) == 0


def test_a_release_before_the_prefill_has_ended_frees_when_it_ends(d: Driver) -> None:
    d.schedule()
    d.attach()
    assert d.do(machine.Released(WORKER)) == []
    assert d.compute(4) == [], "nothing is announced to nobody"
    actions = d.do(machine.PrefillEnded(ok=True))
    assert frees(actions) == 1 and forgotten(actions) == ["done"]


def test_a_watcher_that_declines_frees_the_blocks(d: Driver) -> None:
    d.watch()
    d.schedule()
    d.compute(4)
    d.do(machine.PrefillEnded(ok=True))
    assert frees(d.do(machine.Released(SCHEDULER))) == 1


def test_a_watcher_that_leaves_while_its_worker_pulls_changes_nothing(d: Driver) -> None:
    d.watch()
    d.schedule()
    d.attach()
    d.compute(4)
    d.do(machine.PrefillEnded(ok=True))
    assert d.do(machine.LinkLost(SCHEDULER)) == []
    assert d.source.state is SourceState.HELD


def test_held_blocks_are_freed_and_withdrawn_when_the_lease_is_over(d: Driver) -> None:
    d.watch()
    d.schedule()
    d.attach()
    d.compute(4)
    d.now = 7.0
    d.do(machine.PrefillEnded(ok=True))
    assert d.tick(7.0 + LEASE_S - 0.001) == []
    actions = d.tick(7.0 + LEASE_S)
    assert withdrawals(actions) == [(SCHEDULER, "the lease ran out"), (WORKER, "the lease ran out")]
    assert frees(actions) == 1 and forgotten(actions) == ["the lease ran out"]


def test_the_withdrawal_comes_before_the_blocks_are_freed(d: Driver) -> None:
    d.schedule()
    d.attach()
    d.do(machine.PrefillEnded(ok=True))
    kinds = [type(action) for action in d.tick(LEASE_S)]
    assert kinds == [machine.Tell, machine.FreeBlocks, machine.Forget]


def test_a_running_prefill_has_no_lease(d: Driver) -> None:
    d.schedule()
    d.attach()
    assert d.tick(10 * LEASE_S + EXPIRES_AT) == []


def test_an_aborted_prefill_is_withdrawn_and_frees_nothing(d: Driver) -> None:
    """The engine has taken the blocks back already."""
    d.schedule()
    d.attach()
    d.compute(2)
    actions = d.do(machine.PrefillEnded(ok=False))
    assert withdrawals(actions) == [(WORKER, "the prefill was aborted")]
    assert frees(actions) == 0 and forgotten(actions) == ["the prefill was aborted"]


def test_a_prefill_aborted_before_it_began_is_withdrawn(d: Driver) -> None:
    d.watch()
    assert withdrawals(d.do(machine.PrefillEnded(ok=False))) == [(SCHEDULER, "the prefill was aborted")]


def test_a_prefill_that_never_begins_is_withdrawn_when_the_ticket_expires(d: Driver) -> None:
    d.watch()
    assert d.tick(EXPIRES_AT - 0.001) == []
    actions = d.tick(EXPIRES_AT)
    assert withdrawals(actions) == [(SCHEDULER, "the ticket expired before the prefill began")]
    assert frees(actions) == 0


def test_blocks_are_freed_once_however_often_the_end_is_reported(d: Driver) -> None:
    d.schedule()
    d.attach()
    d.compute(4)
    d.do(machine.PrefillEnded(ok=True))
    d.now = LEASE_S / 2
    d.do(machine.PrefillEnded(ok=True))
    d.tick(LEASE_S)
    d.do(machine.PrefillEnded(ok=True), machine.Released(WORKER), machine.LinkLost(WORKER), machine.Tick())
    assert frees(d.actions) == 1 and len(forgotten(d.actions)) == 1


def test_blocks_of_a_prefill_that_ends_after_the_machine_are_freed_once(d: Driver) -> None:
    d.tick(EXPIRES_AT)
    assert d.do(machine.PrefillEnded(ok=True), machine.PrefillEnded(ok=True)) == [machine.FreeBlocks()]


def test_who_comes_after_the_end_is_refused(d: Driver) -> None:
    d.schedule()
    d.do(machine.PrefillEnded(ok=False))
    assert refusals(d.watch()) == [(SCHEDULER, "ended")]
    assert refusals(d.attach()) == [(WORKER, "ended")]
