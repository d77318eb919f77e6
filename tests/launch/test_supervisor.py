"""The supervisor's state machine, without processes, time or ports."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_plugins.launch import Supervisor
from mooncake_plugins.launch._supervisor import (
    ENDED,
    KILL_WAIT_S,
    REPORT_EVERY_S,
    TRANSITIONS,
    Action,
    AllReady,
    Begin,
    Cause,
    Event,
    Exit,
    Interrupt,
    Kill,
    PartExited,
    PartReady,
    Say,
    ShowLog,
    Spawn,
    State,
    Terminate,
    Tick,
    describe_exit,
)

NEEDS = {"prefill-0": frozenset[str](), "decode-0": frozenset[str](), "conductor": frozenset({"prefill-0", "decode-0"})}
READY_TIMEOUT_S, GRACE_S = 100.0, 20.0


def supervisor() -> Supervisor:
    return Supervisor(NEEDS, ready_timeout_s=READY_TIMEOUT_S, grace_s=GRACE_S)


def running() -> Supervisor:
    machine = supervisor()
    machine.handle(Begin(), 0.0)
    for part in NEEDS:
        machine.handle(PartReady(part), 1.0)
    return machine


def without_words(actions: list[Action]) -> list[Action]:
    return [action for action in actions if not isinstance(action, Say)]


def words(actions: list[Action]) -> str:
    return "\n".join(action.text for action in actions if isinstance(action, Say))


def test_engines_start_together_and_the_conductor_after_them() -> None:
    machine = supervisor()
    assert machine.handle(Begin(), 0.0) == [Spawn("prefill-0"), Spawn("decode-0")]
    assert machine.handle(PartReady("decode-0"), 2.0) == [Say("decode-0 is ready after 2.0 s")]
    assert without_words(machine.handle(PartReady("prefill-0"), 3.0)) == [Spawn("conductor")]
    assert without_words(machine.handle(PartReady("conductor"), 4.0)) == [AllReady()]
    assert machine.deadline is None


def test_an_interrupt_stops_all_and_ends_well() -> None:
    machine = running()
    assert without_words(machine.handle(Interrupt("SIGINT"), 5.0)) == [Terminate(part) for part in NEEDS]
    assert machine.handle(PartExited("conductor", 0), 6.0) == []
    assert machine.handle(PartExited("prefill-0", -15), 6.0) == []
    assert machine.handle(PartExited("decode-0", 1), 6.0) == [Exit(0)]


def test_an_interrupt_before_the_conductor_was_started() -> None:
    machine = supervisor()
    machine.handle(Begin(), 0.0)
    assert without_words(machine.handle(Interrupt("SIGINT"), 1.0)) == [Terminate("prefill-0"), Terminate("decode-0")]
    machine.handle(PartExited("prefill-0", 0), 2.0)
    assert machine.handle(PartReady("decode-0"), 2.0) == []
    assert machine.handle(PartExited("decode-0", 0), 2.0) == [Exit(0)]


def test_a_second_interrupt_kills_what_is_left() -> None:
    machine = running()
    machine.handle(Interrupt("SIGINT"), 5.0)
    machine.handle(PartExited("conductor", 0), 5.5)
    assert machine.handle(Interrupt("SIGINT"), 6.0) == [Kill("prefill-0"), Kill("decode-0")]
    assert machine.handle(Interrupt("SIGINT"), 6.1) == []


@pytest.mark.parametrize("part", NEEDS)
def test_the_death_of_any_part_stops_the_others(part: str) -> None:
    machine = running()
    actions = machine.handle(PartExited(part, 3), 5.0)
    assert actions[:2] == [Say(f"{part} died: exit code 3"), ShowLog(part)]
    assert actions[2:] == [Terminate(other) for other in NEEDS if other != part]
    others = [other for other in NEEDS if other != part]
    assert machine.handle(PartExited(others[0], -15), 6.0) == []
    assert machine.handle(PartExited(others[1], -15), 6.0) == [Exit(1)]


def test_a_part_that_cannot_be_started() -> None:
    machine = supervisor()
    machine.handle(Begin(), 0.0)
    actions = machine.handle(PartExited("prefill-0", None, "Permission denied"), 0.1)
    assert words(actions) == "prefill-0 could not be started: Permission denied"
    assert Terminate("decode-0") in actions


def test_a_part_that_is_late_is_a_failure() -> None:
    machine = supervisor()
    machine.handle(Begin(), 0.0)
    machine.handle(PartReady("decode-0"), 10.0)
    actions = machine.handle(Tick(), READY_TIMEOUT_S)
    assert "prefill-0 was not ready within 100 s" in words(actions)
    assert without_words(actions) == [Terminate("prefill-0"), ShowLog("prefill-0"), Terminate("decode-0")]
    machine.handle(PartExited("prefill-0", 0), 101.0)
    assert machine.handle(PartExited("decode-0", 0), 101.0) == [Exit(1)]


def test_two_late_parts_are_both_named() -> None:
    machine = supervisor()
    machine.handle(Begin(), 0.0)
    actions = machine.handle(Tick(), READY_TIMEOUT_S)
    assert "prefill-0 was not ready" in words(actions)
    assert without_words(actions).count(Terminate("decode-0")) == 1


def test_progress_is_told_while_parts_start() -> None:
    machine = supervisor()
    machine.handle(Begin(), 0.0)
    assert machine.deadline == REPORT_EVERY_S
    machine.handle(PartReady("decode-0"), 10.0)
    assert machine.handle(Tick(), REPORT_EVERY_S) == [Say("waiting for prefill-0 (15 s so far)")]
    assert machine.deadline == 2 * REPORT_EVERY_S


def test_a_deaf_part_is_killed_and_a_dead_one_given_up() -> None:
    machine = running()
    machine.handle(Interrupt("SIGTERM"), 5.0)
    machine.handle(PartExited("conductor", 0), 5.0)
    machine.handle(PartExited("decode-0", 0), 5.0)
    assert machine.deadline == 5.0 + GRACE_S
    actions = machine.handle(Tick(), 5.0 + GRACE_S)
    assert actions == [Say("prefill-0 did not stop within 20 s; killing it"), Kill("prefill-0")]
    actions = machine.handle(Tick(), 5.0 + GRACE_S + KILL_WAIT_S)
    assert "did not end after SIGKILL" in words(actions)
    assert actions[-1] == Exit(1)


def test_a_tick_too_early_changes_nothing() -> None:
    machine = supervisor()
    machine.handle(Begin(), 0.0)
    assert machine.handle(Tick(), 1.0) == []


def test_the_table_leads_everywhere_to_an_end() -> None:
    for state in set(State) - ENDED:
        reachable, todo = {state}, [state]
        while todo:
            here = todo.pop()
            for (before, _), after in TRANSITIONS.items():
                if before is here and after not in reachable:
                    reachable.add(after)
                    todo.append(after)
        assert State.GONE in reachable
    assert {cause for _, cause in TRANSITIONS} == set(Cause)


EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.sampled_from([PartReady(part) for part in NEEDS]),
    st.sampled_from([PartExited(part, code) for part in NEEDS for code in (0, 1, -9)]),
    st.sampled_from([Interrupt("SIGINT"), Tick()]),
)


@settings(max_examples=300)
@given(st.lists(st.tuples(EVENTS, st.floats(0, 60)), max_size=40))
def test_whatever_happens_only_what_runs_is_touched_and_it_ends(events: list[tuple[Event, float]]) -> None:
    machine, now, alive, is_over = supervisor(), 0.0, set[str](), False

    def perform(event: Event) -> None:
        nonlocal is_over
        for action in machine.handle(event, now):
            assert not is_over
            match action:
                case Spawn(part):
                    assert part not in alive
                    alive.add(part)
                case Terminate(part) | Kill(part):
                    assert part in alive
                case Exit():
                    is_over = True

    perform(Begin())
    for event, passed in events:
        now += passed
        if isinstance(event, PartExited):
            if event.part not in alive:
                continue
            alive.discard(event.part)
        if not is_over:
            perform(event)
    if not is_over:
        perform(Interrupt("SIGTERM"))
    while not is_over:  # nothing reacts any more: only time passes
        assert machine.deadline is not None
        now = max(now, machine.deadline)
        perform(Tick())


@pytest.mark.parametrize(
    ("returncode", "text"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-11, "killed by signal 11 (SIGSEGV)"),
        (-63, "killed by signal 63"),
        (None, "unknown"),
    ],
)
def test_describe_exit(returncode: int | None, text: str) -> None:
    assert text in describe_exit(returncode)
