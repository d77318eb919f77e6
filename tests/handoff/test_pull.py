"""The decode worker's state machine: one behaviour a test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from mooncake_plugins.handoff import _messages as wire
from mooncake_plugins.handoff import _pull as machine
from mooncake_plugins.handoff._pull import OK, PullSession, PullState

LAYERS, FIRST, BLOCKS = 2, 3, 4
DEADLINE = 100.0


class Driver:
    """Feeds a ``PullSession`` and keeps what it did."""

    def __init__(self, *, verify: bool = True) -> None:
        self.session = PullSession("t", LAYERS, FIRST, BLOCKS, deadline=DEADLINE, verify=verify)
        self.now = 0.0
        self.actions: list[machine.PullAction] = []

    def do(self, *events: machine.PullEvent) -> list[machine.PullAction]:
        """What these events make it do."""
        fresh = [action for event in events for action in self.session.handle(event, self.now)]
        self.actions += fresh
        return fresh

    def hear(self, *messages: wire.ToDecode) -> list[machine.PullAction]:
        return self.do(*(machine.Message(message) for message in messages))

    def attach(self, attempt: int = 0) -> list[machine.PullAction]:
        self.do(machine.LinkUp())
        return self.hear(wire.Attached("t", attempt, [0] * LAYERS, [8] * LAYERS, [8] * LAYERS, 99))

    def read(self, seq: int, *, layer0: int = 0, layer1: int = LAYERS, block0: int = FIRST, blocks: int = BLOCKS,
             attempt: int = 0) -> list[machine.PullAction]:  # fmt: skip
        """Announce a span; what it makes the machine do."""
        return self.hear(wire.Ready("t", attempt, seq, layer0, layer1, block0, list(range(50, 50 + blocks))))

    def done(self, seq: int, count: int = LAYERS * BLOCKS, *, attempt: int = 0) -> list[machine.PullAction]:
        return self.do(machine.ReadDone(attempt, seq, sums(seq, count)))

    def failed(self, seq: int, *, attempt: int = 0) -> list[machine.PullAction]:
        return self.do(machine.ReadDone(attempt, seq, None, "the peer closed"))

    def commit(self, seq: int, count: int = LAYERS * BLOCKS, *, attempt: int = 0, wrong: Sequence[int] = ()
               ) -> list[machine.PullAction]:  # fmt: skip
        theirs = sums(seq, count)
        theirs[list(wrong)] ^= np.uint64(1)
        return self.hear(wire.Commit("t", attempt, seq, theirs.astype("<u8").tobytes()))

    @property
    def finish(self) -> machine.Finish:
        """The one report."""
        (finish,) = [action for action in self.actions if isinstance(action, machine.Finish)]
        return finish

    @property
    def is_finished(self) -> bool:
        return any(isinstance(action, machine.Finish) for action in self.actions)


def sums(seq: int, count: int) -> npt.NDArray[np.uint64]:
    return np.arange(seq * 1000, seq * 1000 + count, dtype=np.uint64)


ALL = tuple(range(FIRST, FIRST + BLOCKS))


@pytest.fixture
def d() -> Driver:
    return Driver()


# --- the good way ----------------------------------------------------------------------------------------------------


def test_it_attaches_when_the_link_is_up_and_checks_the_layout_first(d: Driver) -> None:
    assert d.do(machine.LinkUp()) == [machine.SendAttach()]
    attached = wire.Attached("t", 0, [0, 0], [8, 8], [8, 8], 99)
    assert d.hear(attached) == [machine.UseLayout(attached)]


def test_a_span_is_read_then_acknowledged_then_counted_when_committed(d: Driver) -> None:
    d.attach()
    (start,) = d.read(1)
    assert isinstance(start, machine.StartRead)
    assert (start.span.layer0, start.span.layer1, start.span.block0, start.span.block1) == (
        0,
        LAYERS,
        FIRST,
        FIRST + BLOCKS,
    )
    assert d.done(1) == [machine.Send(wire.Fetched("t", 0, 1))]
    assert not d.is_finished
    release, finish = d.commit(1)
    assert release == machine.Send(wire.Release("t", OK))
    assert finish == machine.Finish(OK, (), BLOCKS, 0)
    assert d.session.state is PullState.ENDED


def test_it_ends_when_the_last_block_of_the_last_layer_is_committed(d: Driver) -> None:
    d.attach()
    pieces = [(0, 1, FIRST, 2), (1, 2, FIRST, 2), (0, 1, FIRST + 2, 2), (1, 2, FIRST + 2, 2)]
    for seq, (layer0, layer1, block0, blocks) in enumerate(pieces, 1):
        assert not d.is_finished
        d.read(seq, layer0=layer0, layer1=layer1, block0=block0, blocks=blocks)
        d.done(seq, blocks)
        d.commit(seq, blocks)
    assert d.finish == machine.Finish(OK, (), BLOCKS, 0)


def test_data_without_a_commit_is_worth_nothing(d: Driver) -> None:
    d.attach()
    d.read(1)
    d.done(1)
    d.now = DEADLINE
    d.do(machine.Tick())
    assert d.finish == machine.Finish("deadline", ALL, 0, 0)


def test_a_commit_without_data_is_worth_nothing(d: Driver) -> None:
    d.attach()
    d.read(1)
    assert d.commit(1) == []
    d.done(1)
    assert not d.is_finished


# --- checksums -------------------------------------------------------------------------------------------------------


def test_a_block_whose_checksum_differs_is_named_and_counted(d: Driver) -> None:
    d.attach()
    d.read(1)
    d.done(1)
    d.commit(1, wrong=[BLOCKS + 1])
    assert d.finish == machine.Finish("checksum", (FIRST + 1,), BLOCKS - 1, 1)


def test_a_block_is_bad_if_one_of_its_layers_is(d: Driver) -> None:
    d.attach()
    for layer in range(LAYERS):
        d.read(layer + 1, layer0=layer, layer1=layer + 1)
        d.done(layer + 1, BLOCKS)
    d.commit(1, BLOCKS)
    d.commit(2, BLOCKS, wrong=[0, 3])
    assert d.finish == machine.Finish("checksum", (FIRST, FIRST + 3), BLOCKS - 2, 2)


def test_a_mismatch_waits_for_other_reads_before_it_is_reported(d: Driver) -> None:
    d.attach()
    d.read(1, blocks=2)
    d.read(2, block0=FIRST + 2, blocks=2)
    d.done(1, LAYERS * 2)
    assert d.commit(1, LAYERS * 2, wrong=[0]) == [machine.CancelReads()]
    assert not d.is_finished
    d.failed(2)
    assert d.finish.outcome == "checksum" and d.finish.bad == (FIRST, FIRST + 2, FIRST + 3)


def test_without_verification_wrong_bytes_are_believed() -> None:
    d = Driver(verify=False)
    d.attach()
    d.read(1)
    d.done(1)
    d.commit(1, wrong=[0, 1, 2])
    assert d.finish == machine.Finish(OK, (), BLOCKS, 0)


@pytest.mark.parametrize(
    "checksums", [b"", b"\0" * 7, b"\0" * (8 * LAYERS * BLOCKS - 1), b"\0" * (8 * LAYERS * BLOCKS + 8)]
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_commit_of_the_wrong_size_ends_the_transfer_at_once(checksums: bytes, verify: bool) -> None:
    d = Driver(verify=verify)
    d.attach()
    d.read(1)
    d.done(1)
    d.hear(wire.Commit("t", 0, 1, checksums))
    assert d.finish.outcome.startswith("protocol") and d.finish.bad == ALL


# --- what prefill may not say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        {"block0": FIRST - 1},
        {"block0": FIRST + 1},
        {"blocks": 0},
        {"blocks": BLOCKS + 1},
        {"layer0": 1, "layer1": 1},
        {"layer1": LAYERS + 1},
        {"layer0": LAYERS, "layer1": LAYERS + 1},
    ],
)
def test_a_span_outside_what_was_asked_for_is_not_read(d: Driver, place: dict[str, int]) -> None:
    d.attach()
    d.read(1, **place)
    assert d.finish.outcome.startswith("protocol")
    assert not any(isinstance(action, machine.StartRead) for action in d.actions)


def test_a_block_that_is_announced_twice_is_not_read_twice(d: Driver) -> None:
    """A second read could still be writing when the first one's commit makes the block good."""
    d.attach()
    d.read(1)
    assert d.read(2, layer0=1, blocks=1) == [machine.CancelReads()]
    d.done(1)
    assert d.finish.outcome.startswith("protocol") and d.finish.bad == ALL


@pytest.mark.parametrize(
    "message",
    [
        wire.Ready("t", 0, 1, 0, LAYERS, FIRST, [1] * BLOCKS),
        wire.Commit("t", 0, 1, b""),
        wire.Restarted("t", 1),
        wire.Scheduled("t"),
    ],
)
def test_what_comes_before_the_layout_is_ignored(d: Driver, message: wire.ToDecode) -> None:
    d.do(machine.LinkUp())
    assert d.hear(message) == []


def test_a_second_layout_is_ignored(d: Driver) -> None:
    d.attach()
    assert d.hear(wire.Attached("t", 0, [1], [8], [8], 9)) == []


def test_a_layout_that_does_not_fit_ends_the_transfer(d: Driver) -> None:
    d.attach()
    d.do(machine.LayoutRefused("61 layers on prefill, 2 on decode"))
    assert d.finish == machine.Finish("layout: 61 layers on prefill, 2 on decode", ALL, 0, 0)


# --- restarts --------------------------------------------------------------------------------------------------------


def test_a_restart_discards_what_was_good(d: Driver) -> None:
    d.attach()
    d.read(1, blocks=2)
    d.done(1, LAYERS * 2)
    d.commit(1, LAYERS * 2)
    d.hear(wire.Restarted("t", 1))
    d.now = DEADLINE
    d.do(machine.Tick())
    assert d.finish == machine.Finish("deadline", ALL, 0, 0)


def test_a_restart_discards_what_was_read_and_not_committed(d: Driver) -> None:
    d.attach()
    d.read(1)
    d.done(1)
    d.hear(wire.Restarted("t", 1))
    assert d.commit(1) == [] and d.commit(1, attempt=1) == []


def test_everything_is_read_again_after_a_restart(d: Driver) -> None:
    d.attach()
    d.read(1)
    d.done(1)
    d.hear(wire.Restarted("t", 1))
    assert len(d.read(2, attempt=1)) == 1
    d.done(2, attempt=1)
    d.commit(2, attempt=1)
    assert d.finish == machine.Finish(OK, (), BLOCKS, 0)


def test_reads_of_a_new_attempt_wait_until_those_of_the_old_have_ended(d: Driver) -> None:
    """An old read that is still under way could overwrite what the new one brings."""
    d.attach()
    d.read(1, blocks=2)
    d.read(2, block0=FIRST + 2, blocks=2)
    assert d.hear(wire.Restarted("t", 1)) == [machine.CancelReads()]
    assert d.read(3, attempt=1) == []
    assert d.done(1, LAYERS * 2) == []
    (start,) = d.failed(2)
    assert isinstance(start, machine.StartRead) and start.attempt == 1
    d.done(3, attempt=1)
    d.commit(3, attempt=1)
    assert d.finish == machine.Finish(OK, (), BLOCKS, 0)


def test_a_failed_read_of_an_old_attempt_does_not_fail_the_transfer(d: Driver) -> None:
    d.attach()
    d.read(1)
    d.hear(wire.Restarted("t", 1))
    assert d.failed(1) == []
    assert d.session.state is PullState.PULLING


def test_a_second_restart_discards_reads_that_still_wait(d: Driver) -> None:
    d.attach()
    d.read(1)
    d.hear(wire.Restarted("t", 1))
    d.read(2, attempt=1)
    d.hear(wire.Restarted("t", 2))
    assert d.failed(1) == []
    assert len(d.read(3, attempt=2)) == 1


def test_messages_of_an_old_attempt_are_ignored(d: Driver) -> None:
    d.attach(attempt=2)
    assert d.read(1, attempt=1) == []
    d.read(2, attempt=2)
    d.done(2, attempt=2)
    assert d.commit(2, attempt=1) == []


def test_a_restart_that_is_said_again_discards_nothing(d: Driver) -> None:
    d.attach()
    d.hear(wire.Restarted("t", 1))
    d.read(1, attempt=1)
    d.done(1, attempt=1)
    assert d.hear(wire.Restarted("t", 1), wire.Restarted("t", 0)) == []
    d.commit(1, attempt=1)
    assert d.finish == machine.Finish(OK, (), BLOCKS, 0)


# --- failing ---------------------------------------------------------------------------------------------------------

FAILURES: list[tuple[machine.PullEvent, str]] = [
    (machine.Cancelled(), "cancelled"),
    (machine.Lost("prefill fell silent"), "prefill fell silent"),
    (machine.Message(wire.Withdrawn("t", "the lease ran out")), "withdrawn: the lease ran out"),
    (machine.Message(wire.Refused("t", "reused", "twice")), "refused (reused): twice"),
]


@pytest.mark.parametrize(("event", "outcome"), FAILURES)
def test_a_failure_before_anything_was_read_is_reported_at_once(
    d: Driver, event: machine.PullEvent, outcome: str
) -> None:
    d.do(machine.LinkUp(), event)
    assert d.finish == machine.Finish(outcome, ALL, 0, 0)


@pytest.mark.parametrize(("event", "outcome"), FAILURES)
def test_a_failure_is_reported_only_when_the_last_read_has_ended(
    d: Driver, event: machine.PullEvent, outcome: str
) -> None:
    d.attach()
    d.read(1, blocks=2)
    d.read(2, block0=FIRST + 2, blocks=2)
    assert d.do(event) == [machine.CancelReads()]
    assert d.session.state is PullState.FENCING
    assert d.failed(1) == []
    d.done(2, LAYERS * 2)
    assert d.finish == machine.Finish(outcome, ALL, 0, 0)


def test_the_deadline_is_noticed_in_every_state(d: Driver) -> None:
    d.now = DEADLINE - 0.001
    assert d.do(machine.Tick()) == []
    d.now = DEADLINE
    d.do(machine.Tick())
    assert d.finish.outcome == "deadline"


def test_the_deadline_also_waits_for_reads(d: Driver) -> None:
    d.attach()
    d.read(1)
    d.now = DEADLINE
    assert d.do(machine.Tick()) == [machine.CancelReads()]
    assert d.do(machine.Tick()) == []
    d.failed(1)
    assert d.finish.outcome == "deadline"


def test_a_failed_read_fails_the_transfer_and_says_why(d: Driver) -> None:
    d.attach()
    d.read(1)
    d.failed(1)
    assert d.finish == machine.Finish("read: the peer closed", ALL, 0, 0)


def test_the_first_failure_is_the_one_that_is_reported(d: Driver) -> None:
    d.attach()
    d.read(1)
    d.do(machine.Lost("silent"), machine.Cancelled(), machine.Message(wire.Withdrawn("t", "late")))
    d.failed(1)
    assert d.finish.outcome == "silent"


def test_blocks_that_are_good_in_all_layers_survive_a_failure(d: Driver) -> None:
    d.attach()
    d.read(1, blocks=2)
    d.done(1, LAYERS * 2)
    d.commit(1, LAYERS * 2)
    d.read(2, layer1=1, block0=FIRST + 2, blocks=1)
    d.done(2, 1)
    d.commit(2, 1)
    d.do(machine.Lost("gone"))
    assert d.finish == machine.Finish("gone", (FIRST + 2, FIRST + 3), 2, 0)


def test_nothing_is_started_while_reads_are_being_stopped(d: Driver) -> None:
    d.attach()
    d.read(1, blocks=2)
    d.do(machine.Cancelled())
    assert d.read(2, block0=FIRST + 2, blocks=2) == []
    assert d.hear(wire.Restarted("t", 1)) == []
    assert d.do(machine.LinkUp()) == []


def test_prefill_is_released_once_with_the_outcome(d: Driver) -> None:
    d.attach()
    d.read(1)
    d.failed(1)
    releases = [a.message for a in d.actions if isinstance(a, machine.Send) and isinstance(a.message, wire.Release)]
    assert releases == [wire.Release("t", "read: the peer closed")]


def test_after_the_end_nothing_happens_any_more(d: Driver) -> None:
    d.attach()
    d.read(1)
    d.done(1)
    d.commit(1)
    d.now = DEADLINE
    late: list[machine.PullEvent] = [
        machine.Tick(),
        machine.LinkUp(),
        machine.LayoutRefused(""),
        machine.ReadDone(0, 1, None),
    ]
    assert d.do(*(event for event, _ in FAILURES), *late) == []
    assert d.commit(1) == [] and d.read(2) == []


def test_a_read_that_was_never_started_means_nothing(d: Driver) -> None:
    d.attach()
    assert d.done(7) == []
    assert d.failed(7) == []
