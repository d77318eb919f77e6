"""The prefill side's state machine: who is served, and how it ends; one behaviour a test."""

from __future__ import annotations

import pytest

from mooncake_plugins.handoff import _source as machine
from mooncake_plugins.handoff._source import SourceState
from tests.handoff.source_driver import (
    ALL,
    EXPIRES_AT,
    LEASE_S,
    OTHER,
    SCHEDULER,
    WORKER,
    Driver,
    cells,
    forgotten,
    frees,
    refusals,
    withdrawals,
)


@pytest.fixture
def d() -> Driver:
    return Driver()


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
