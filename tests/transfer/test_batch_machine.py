"""The states of a batch: terminal only when no work is active."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mooncake_plugins.errors import DeadlineExceededError, PeerClosedError
from mooncake_plugins.transfer import BatchStatus
from mooncake_plugins.transfer._batch_machine import (
    Action,
    BatchMachine,
    CancelRequested,
    DeadlinePassed,
    WorkDone,
    WorkFailed,
)

GONE = PeerClosedError("gone")


def test_done_when_all_works_are_done() -> None:
    machine = BatchMachine(2)
    assert machine.begin() and machine.begin()
    assert machine.handle(WorkDone(10)) == ()
    assert machine.handle(WorkDone(5)) == (Action.FINISH,)
    assert (machine.status, machine.bytes_done, machine.error) == (BatchStatus.DONE, 15, None)


def test_failed_only_once_the_other_works_have_ended() -> None:
    machine = BatchMachine(3)
    assert machine.begin() and machine.begin()
    assert machine.handle(WorkFailed(GONE)) == (Action.STOP_MOVERS,)
    assert machine.status is BatchStatus.PENDING
    assert not machine.begin(), "the third work must not begin any more"
    assert machine.handle(WorkDone(1)) == (Action.FINISH,)
    assert (machine.status, machine.error) == (BatchStatus.FAILED, GONE)


def test_works_that_never_began_need_not_be_waited_for() -> None:
    machine = BatchMachine(5)
    assert machine.handle(CancelRequested()) == (Action.FINISH,)
    assert (machine.status, machine.error) == (BatchStatus.CANCELLED, None)


def test_deadline_is_the_error() -> None:
    machine = BatchMachine(1)
    assert machine.begin()
    assert machine.handle(DeadlinePassed()) == (Action.STOP_MOVERS,)
    assert machine.handle(DeadlinePassed()) == ()
    assert machine.handle(WorkFailed(GONE)) == (Action.FINISH,)
    assert isinstance(machine.error, DeadlineExceededError)


def test_first_reason_wins() -> None:
    machine = BatchMachine(2)
    assert machine.begin()
    machine.handle(CancelRequested())
    machine.handle(WorkFailed(GONE))
    assert (machine.status, machine.error) == (BatchStatus.CANCELLED, None)


def test_terminal_stays() -> None:
    machine = BatchMachine(1)
    machine.begin()
    machine.handle(WorkDone(1))
    for event in (CancelRequested(), DeadlinePassed()):
        assert machine.handle(event) == ()
    assert machine.status is BatchStatus.DONE


@given(st.integers(1, 6), st.lists(st.sampled_from(["begin", "done", "fail", "cancel", "deadline", "early"])))
def test_never_terminal_while_a_work_is_active(works: int, steps: list[str]) -> None:
    machine, active, begun, finishes = BatchMachine(works), 0, 0, 0
    for step in steps:
        actions: tuple[Action, ...] = ()
        if step == "begin":
            if begun < works and machine.begin():
                active, begun = active + 1, begun + 1
        elif step in ("done", "fail"):
            if active:
                active -= 1
                actions = machine.handle(WorkDone(1) if step == "done" else WorkFailed(GONE))
        elif step == "early":
            actions = machine.fail_early(GONE)
        else:
            actions = machine.handle(CancelRequested() if step == "cancel" else DeadlinePassed())
        finishes += actions.count(Action.FINISH)
        assert machine.active == active
        if machine.is_terminal:
            assert active == 0
        assert finishes == int(machine.is_terminal), "told exactly once"
