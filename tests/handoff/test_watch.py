"""The decode scheduler's state machine: one behaviour a test."""

from __future__ import annotations

import pytest

from mooncake_plugins.handoff import WatchSession, WatchState
from mooncake_plugins.handoff import _messages as wire

DEADLINE = 10.0


@pytest.fixture
def session() -> WatchSession:
    return WatchSession("t", DEADLINE)


def test_it_asks_until_prefill_has_begun(session: WatchSession) -> None:
    states = [session.state]
    session.answered(wire.Scheduled("t"))
    assert [*states, session.state] == [WatchState.ASKING, WatchState.READY]


def test_a_refusal_declines_and_says_why(session: WatchSession) -> None:
    session.answered(wire.Refused("t", "fingerprint", "dtype is 'a' on decode and 'b' on prefill"))
    assert (session.state, session.reason) == (WatchState.DECLINED, "fingerprint")
    assert session.detail == "dtype is 'a' on decode and 'b' on prefill"


@pytest.mark.parametrize("ready", [False, True])
def test_a_withdrawal_declines_also_when_ready(session: WatchSession, ready: bool) -> None:
    if ready:
        session.answered(wire.Scheduled("t"))
    session.answered(wire.Withdrawn("t", "the lease ran out"))
    assert (session.state, session.reason, session.detail) == (WatchState.DECLINED, "withdrawn", "the lease ran out")


def test_the_deadline_declines_who_still_asks(session: WatchSession) -> None:
    session.tick(DEADLINE - 0.001)
    assert session.state is WatchState.ASKING
    session.tick(DEADLINE)
    assert (session.state, session.reason) == (WatchState.DECLINED, "deadline")


def test_the_deadline_means_nothing_once_ready(session: WatchSession) -> None:
    session.answered(wire.Scheduled("t"))
    session.tick(DEADLINE + 1)
    assert session.state is WatchState.READY


def test_the_first_reason_stays(session: WatchSession) -> None:
    session.decline("unreachable", "no route")
    session.answered(wire.Refused("t", "reused", ""))
    session.tick(DEADLINE)
    session.answered(wire.Scheduled("t"))
    assert (session.state, session.reason, session.detail) == (WatchState.DECLINED, "unreachable", "no route")


@pytest.mark.parametrize(
    "message", [wire.Restarted("t", 1), wire.Ready("t", 0, 1, 0, 1, 0, [1]), wire.Commit("t", 0, 1, b"")]
)
def test_messages_for_workers_mean_nothing_to_it(session: WatchSession, message: wire.ToDecode) -> None:
    session.answered(message)
    assert session.state is WatchState.ASKING
