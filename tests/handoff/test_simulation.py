"""Both machines together, under the interleavings that Hypothesis and chance find; see ``simulation.py``."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mooncake_plugins.handoff import _pull as pull
from mooncake_plugins.handoff import _source as source
from mooncake_plugins.handoff._source import SourceState
from tests.handoff.simulation import (
    LAYERS,
    LEASE_S,
    P_BLOCKS,
    PROMPT,
    PULL_S,
    SCHEDULER,
    STRANGER,
    TICKET_S,
    TOKENS,
    WORKER,
    Decode,
    Prefill,
    ReadJob,
)


class Handoff(RuleBasedStateMachine):
    """One transfer from beginning to end. ``moves`` lets everything go on, other rules disturb."""

    @initialize(blocks=st.integers(1, 5), first=st.integers(0, 2), other_prompt=st.integers(0, 19))
    def begin(self, blocks: int, first: int, other_prompt: int) -> None:
        first = min(first, blocks - 1)
        self.now = 0.0
        self.p = Prefill(blocks)
        self.d = Decode(first, blocks - first)
        if other_prompt == 19:
            self.d.prompt = b"another prompt"
        self.has_watched = self.has_stranger = False

    # --- what goes on by itself --------------------------------------------------------------------------------------

    @rule(choices=st.lists(st.integers(0, 10_000), min_size=20, max_size=40))
    def moves(self, choices: list[int]) -> None:
        """Each number picks one of the threads and queues that can move, and how far it goes."""
        for choice in choices:
            self.moves_once(choice)

    def moves_once(self, choice: int) -> None:
        possible = self.possible_moves()
        if possible:
            choice, index = divmod(choice, len(possible))
            possible[index](choice)
            self.d.check_untouched()

    def possible_moves(self) -> list[Callable[[int], None]]:
        found: list[tuple[object, Callable[[int], None]]] = [
            (self.p.is_alive and self.p.phase not in ("held", "gone"), self.prefill_engine),
            (self.p.is_alive and self.p.inbox, lambda _: self.p.step(self.now)),
            (self.p.is_alive and self.p.to_hash, lambda _: self.p.hash_block()),
            (self.p.is_idle and self.p.freed > self.p.finished, lambda _: self.p.take_finished()),
            (self.p.is_alive and self.p.phase == "gone", self.others_use_blocks),
            (self.d.machine is None, lambda _: self.d.start(self.now)),
            (self.d.machine is not None and self.d.inbox, lambda _: self.d.step(self.now)),
            (self.d.to_prefill and self.p.is_alive, self.deliver_to_prefill),
            (self.p.to_decode[WORKER], lambda _: self.deliver_to_decode()),
            (self.p.to_decode[SCHEDULER], lambda _: self.d.watch.answered(self.p.to_decode[SCHEDULER].popleft())),
            (self.d.reads and self.p.is_alive, self.read_on),
            (self.d.reads and self.p.is_alive, self.read_on),
            (self.stoppable_reads, self.a_read_stops),
        ]
        return [move for can_move, move in found if can_move]

    def prefill_engine(self, choice: int) -> None:
        """The next layer of the step in progress, or else the next step."""
        p = self.p
        free = p.free_blocks
        start = choice % len(free)
        free = free[start:] + free[:start]
        if p.step_layer is not None:
            p.compute_layer()
        elif p.phase == "waiting":
            cached = choice % p.blocks
            after = min(cached + 1 + choice % 3, p.blocks)
            p.begin_first_chunk(free[: after + choice % (p.blocks - after + 1)], cached, after)
        elif p.phase == "running":
            after = min(p.computed + choice % 3, p.blocks)
            p.begin_next_chunk(free[: max(0, after - len(p.ids))], after)
        elif choice % 16 == 7:
            p.hold()

    def others_use_blocks(self, choice: int) -> None:
        free = self.p.free_blocks
        self.p.overwrite(choice % LAYERS, free[choice % len(free)])

    def deliver_to_prefill(self, choice: int) -> None:
        event = self.d.to_prefill.popleft()
        self.p.inbox.append(event)
        if choice % 10 == 9 and not isinstance(event, source.Attached):
            self.p.inbox.append(event)

    def deliver_to_decode(self) -> None:
        self.d.inbox.append(pull.Message(self.p.to_decode[WORKER].popleft()))

    def read_on(self, choice: int) -> None:
        choice, index = divmod(choice, len(self.d.reads))
        job = self.d.reads[index]
        if not job.is_slow or choice % 16 == 0:
            self.d.land(job, self.p)

    @property
    def stoppable_reads(self) -> list[ReadJob]:
        return [job for job in self.d.reads if job.is_cancelled or not self.p.is_alive]

    def a_read_stops(self, choice: int) -> None:
        jobs = self.stoppable_reads
        choice, index = divmod(choice, len(jobs))
        if not jobs[index].is_slow or choice % 16 == 0:
            self.d.end_read(jobs[index], ok=False)

    # --- what disturbs -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.p.is_idle and self.p.phase in ("running", "complete"))
    @rule(overwritten=st.booleans())
    def preempt(self, overwritten: bool) -> None:
        self.p.preempt()
        if overwritten:
            for block in self.p.free_blocks:
                for layer in range(LAYERS):
                    self.p.overwrite(layer, block)

    @precondition(lambda self: self.p.is_idle and self.p.phase in ("waiting", "running", "complete"))
    @rule(sure=st.integers(0, 5))
    def abort(self, sure: int) -> None:
        if sure == 5:
            self.p.abort()

    @precondition(lambda self: len(self.p.ids) < P_BLOCKS and self.p.is_alive)
    @rule(choice=st.integers(0, 1000))
    def overwrite(self, choice: int) -> None:
        self.others_use_blocks(choice)

    @precondition(lambda self: self.d.reads and self.p.is_alive)
    @rule(choice=st.integers(0, 1000), sure=st.integers(0, 3))
    def a_read_is_corrupted(self, choice: int, sure: int) -> None:
        self.d.land(self.d.reads[choice % len(self.d.reads)], self.p, flip=sure == 3)

    @precondition(lambda self: self.d.reads)
    @rule(choice=st.integers(0, 1000), sure=st.integers(0, 5))
    def a_read_fails(self, choice: int, sure: int) -> None:
        if sure == 5:
            self.d.end_read(self.d.reads[choice % len(self.d.reads)], ok=False)

    @precondition(lambda self: not self.has_watched)
    @rule()
    def watch(self) -> None:
        self.has_watched = True
        self.p.inbox.append(source.Watched(SCHEDULER, self.d.prompt, TOKENS))

    @precondition(lambda self: self.has_watched)
    @rule(release=st.booleans(), sure=st.integers(0, 5))
    def watcher_leaves(self, release: bool, sure: int) -> None:
        if sure == 5:
            self.p.inbox.append(source.Released(SCHEDULER) if release else source.LinkLost(SCHEDULER))

    @precondition(lambda self: self.d.machine is not None and self.d.report is None)
    @rule(sure=st.integers(0, 9))
    def cancel(self, sure: int) -> None:
        if sure == 9:
            self.d.inbox.append(pull.Cancelled())

    @precondition(lambda self: not self.has_stranger)
    @rule(sure=st.integers(0, 5))
    def a_stranger_attaches_with_the_same_ticket(self, sure: int) -> None:
        if sure == 5:
            self.has_stranger = True
            self.p.inbox.append(source.Attached(STRANGER, PROMPT, TOKENS, 0))
            self.p.inbox.append(source.Fetched(STRANGER, 0, 1))
            self.p.inbox.append(source.LinkLost(STRANGER))

    @precondition(lambda self: not self.d.is_link_lost and self.d.machine is not None)
    @rule(sure=st.integers(0, 9), arrived=st.integers(0, 5))
    def the_link_is_lost(self, sure: int, arrived: int) -> None:
        """What was under way is lost but for a first part; both sides notice in their own time."""
        if sure != 9:
            return
        self.d.is_link_lost = True
        self.p.lost_links.add(WORKER)
        for _ in range(min(arrived, len(self.p.to_decode[WORKER]))):
            self.deliver_to_decode()
        self.p.to_decode[WORKER].clear()
        self.d.to_prefill.clear()
        self.p.inbox.append(source.LinkLost(WORKER))
        self.d.inbox.append(pull.Lost("the link broke"))

    @precondition(lambda self: self.p.is_alive)
    @rule(sure=st.integers(0, 19))
    def prefill_dies(self, sure: int) -> None:
        if sure == 19:
            self.p.is_alive = False
            self.d.inbox.append(pull.Lost("prefill died"))

    @rule(seconds=st.sampled_from([0.0, 0.0, 0.0, 0.5, 0.5, LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        if self.p.is_alive:
            self.p.tick(self.now)
        self.d.tick(self.now)
        self.d.watch.tick(self.now)

    # --- what must always hold ---------------------------------------------------------------------------------------

    @invariant()
    def nothing_was_written_that_must_not_be(self) -> None:
        if hasattr(self, "d"):
            self.d.check_untouched()

    def teardown(self) -> None:
        if hasattr(self, "p"):
            self.end()
            assert self.d.report is not None
            event(f"outcome: {self.d.report.outcome.split(':')[0]}")

    def end(self) -> None:
        """Deliver everything, end the engine's part, pass all deadlines: then both have ended, and nothing is held."""
        if self.p.is_alive:
            self._end_prefill_engine()
        if self.d.machine is None:
            self.d.start(self.now)
        self.drain()
        self.now += max(LEASE_S, TICKET_S, PULL_S) + 1
        self.time_passes(0.0)
        self.drain()
        self.d.check_untouched()
        assert self.d.report is not None, "a pull was never reported"
        if self.p.is_alive:
            assert self.p.machine.state is SourceState.ENDED
            assert self.p.freed == self.p.finished or self.p.freed == 1
            if self.p.phase == "held":
                assert self.p.freed == 1, "held blocks were never freed"

    def _end_prefill_engine(self) -> None:
        while self.p.phase not in ("held", "gone"):
            self.prefill_engine(7)

    def drain(self) -> None:
        """Let every queue run dry."""
        while self._drain_once():
            self.d.check_untouched()

    def _drain_once(self) -> bool:
        if self.d.reads:
            job = self.d.reads[0]
            if self.p.is_alive:
                self.d.land(job, self.p)
            else:
                self.d.end_read(job, ok=False)
        elif self.p.is_alive and self.p.inbox:
            self.p.step(self.now)
        elif self.p.is_alive and self.p.to_hash:
            self.p.hash_block()
        elif self.d.machine is not None and self.d.inbox:
            self.d.step(self.now)
        elif self.d.to_prefill and self.p.is_alive:
            self.p.inbox.append(self.d.to_prefill.popleft())
        elif self.p.to_decode[WORKER]:
            self.deliver_to_decode()
        else:
            return False
        return True


TestHandoff = Handoff.TestCase
TestHandoff.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


# Disturbances by name: whether it can happen now, and the call. A walk draws a few of them and their frequency.
DISTURBANCES: dict[str, tuple[Callable[[Handoff], object], Callable[[Handoff, random.Random], None]]] = {
    "preempt": (
        lambda h: h.p.is_idle and h.p.phase in ("running", "complete"),
        lambda h, r: h.preempt(r.random() < 0.7),
    ),
    "abort": (lambda h: h.p.is_idle and h.p.phase in ("waiting", "running", "complete"), lambda h, r: h.abort(5)),
    "corrupt": (lambda h: h.d.reads and h.p.is_alive, lambda h, r: h.a_read_is_corrupted(r.randrange(100), 3)),
    "fail": (lambda h: h.d.reads, lambda h, r: h.a_read_fails(r.randrange(100), 5)),
    "watch": (lambda h: not h.has_watched, lambda h, r: h.watch()),
    "leave": (lambda h: h.has_watched, lambda h, r: h.watcher_leaves(r.random() < 0.5, 5)),
    "cancel": (lambda h: h.d.machine is not None and h.d.report is None, lambda h, r: h.cancel(9)),
    "stranger": (lambda h: not h.has_stranger, lambda h, r: h.a_stranger_attaches_with_the_same_ticket(5)),
    "link": (
        lambda h: not h.d.is_link_lost and h.d.machine is not None,
        lambda h, r: h.the_link_is_lost(9, r.randrange(6)),
    ),
    "death": (lambda h: h.p.is_alive, lambda h, r: h.prefill_dies(19)),
    "time": (lambda h: True, lambda h, r: h.time_passes(r.choice([0.5, 1.0, LEASE_S]))),
    "overwrite": (lambda h: h.p.is_alive and len(h.p.ids) < P_BLOCKS, lambda h, r: h.overwrite(r.randrange(1000))),
}


def walk(rng: random.Random, weather: list[str], frequency: float, *, other_prompt: bool) -> Handoff:
    """One transfer in which everything that happens is drawn by chance."""
    handoff = Handoff()
    handoff.begin(rng.randint(1, 5), rng.randint(0, 2), 19 if other_prompt else 0)
    for _ in range(rng.randrange(20, 800)):
        if rng.random() < frequency:
            can_happen, happen = DISTURBANCES[rng.choice(weather)]
            if can_happen(handoff):
                happen(handoff, rng)
        else:
            handoff.moves_once(rng.randrange(1 << 20))
    handoff.end()
    return handoff


def outcomes(walks: list[Handoff]) -> Counter[str]:
    return Counter(h.d.report.outcome.split(":")[0] for h in walks if h.d.report is not None)


def test_random_walks() -> None:
    """Many more interleavings than Hypothesis tries; the same ones in every run."""
    walks = []
    for seed in range(1000):
        rng = random.Random(seed)
        weather = rng.sample(sorted(DISTURBANCES), rng.choice([1, 1, 2, 2, 3]))
        walks.append(walk(rng, weather, rng.choice([0.01, 0.05, 0.2]), other_prompt=rng.random() < 0.05))
    found = outcomes(walks)
    assert found[pull.OK] > 300, "the walks must reach the end"
    assert {"cancelled", "deadline", "checksum", "read", "withdrawn", "the link broke", "prefill died"} <= set(found)


def test_random_walks_with_preemptions_always_end_well() -> None:
    """Nothing but time is lost when prefill takes its blocks away, however often."""
    walks = []
    for seed in range(500):
        rng = random.Random(seed)
        walks.append(walk(rng, ["preempt", "overwrite"], rng.choice([0.02, 0.1, 0.3]), other_prompt=False))
    assert outcomes(walks) == {pull.OK: 500}
    assert sum(h.p.machine.attempt > 0 for h in walks) > 250, "the walks must have preemptions"
    assert sum(h.p.withheld > 0 for h in walks) > 3, "the walks must reach commits that are withheld"
