"""Decisions: pairing, policies, the cluster view, health."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooncake_conductor.core import (
    Action,
    ClusterView,
    Described,
    DescribeFailed,
    Engine,
    Event,
    Fallback,
    Health,
    HealthMachine,
    HealthOptions,
    LeastLoaded,
    Pair,
    Pools,
    Probed,
    Refused,
    RequestFacts,
    Role,
    RoundRobin,
    SchedulingPolicy,
    TrafficFailed,
    Verify,
    decide,
)

FACTS = RequestFacts("m")
GOOD, BAD = Probed(True), Probed(False, "no answer")
BROKEN = TrafficFailed("reset", is_connection=True)


def engine(name: str, role: Role, in_flight: int = 0) -> Engine:
    return Engine(name, role, is_usable=True, in_flight=in_flight, models=frozenset({"m"}))


def pools(*engines: Engine) -> Pools:
    found = ClusterView(engines).pools("m")
    assert found is not None
    return found


def choose(
    *engines: Engine, failed: tuple[Engine, ...] = (), facts: RequestFacts = FACTS, seed: int = 1
) -> Pair | None:
    return decide(facts, pools(*engines), LeastLoaded(), 0.0, Random(seed), failed)


P1, P2 = engine("p1", Role.PREFILL, 3), engine("p2", Role.PREFILL, 1)
D1, D2 = engine("d1", Role.DECODE, 0), engine("d2", Role.DECODE, 5)


def test_the_least_loaded_of_each_role_are_paired() -> None:
    assert choose(P1, P2, D1, D2) == Pair(P2, D1)


def test_failed_engines_are_not_chosen_again() -> None:
    assert choose(P1, P2, D1, D2, failed=(P2, D1)) == Pair(P1, D2)
    assert choose(P1, D1, failed=(P1,)) == Pair(None, D1, Fallback.PREFILL_FAILED)
    assert choose(P1, D1, failed=(D1,)) is None
    assert choose(P1, D1, D2, failed=(D1, D2)) is None


def test_without_prefill_engines_decode_works_alone() -> None:
    assert choose(D1) == Pair(None, D1, Fallback.NO_PREFILL)


def test_a_prefill_engine_never_answers() -> None:
    assert choose(P1, P2) is None


def test_what_must_not_be_split_is_not() -> None:
    assert choose(P1, P2, D1, D2, facts=RequestFacts("m", whole="prompt_logprobs")) == Pair(None, D1, "prompt_logprobs")


def test_coupled_engines_are_used_without_a_reason() -> None:
    coupled = engine("c", Role.COUPLED)
    assert choose(coupled) == Pair(None, coupled)
    assert choose(coupled, facts=RequestFacts("m", whole="x")) == Pair(None, coupled)


def test_an_engine_is_not_paired_with_itself() -> None:
    b1, b2 = engine("b1", Role.BOTH), engine("b2", Role.BOTH, 9)
    for seed in range(20):
        pair = choose(b1, b2, seed=seed)
        assert pair is not None and pair.prefill is not None and pair.prefill is not pair.decode
    assert choose(b1) == Pair(None, b1, Fallback.SINGLE_ENGINE)
    assert choose(b1, b2, failed=(b2,)) == Pair(None, b1, Fallback.SINGLE_ENGINE)
    assert choose(b1, D2) == Pair(b1, D2)  # the only prefill engine is not taken for decode
    assert choose(P1, b1) == Pair(P1, b1)


def test_equals_are_chosen_evenly() -> None:
    engines = [engine(f"c{n}", Role.COUPLED) for n in range(4)]
    rng = Random(1)
    counts = dict.fromkeys(engines, 0)
    for _ in range(4000):
        counts[LeastLoaded().pick(FACTS, Role.COUPLED, engines, 0.0, rng)] += 1
    assert min(counts.values()) > 900


def test_round_robin_takes_turns_for_each_role() -> None:
    policy = RoundRobin()
    chosen = [decide(FACTS, pools(P1, P2, D1, D2), policy, 0.0, Random(1)) for _ in range(4)]
    assert chosen == [Pair(P1, D1), Pair(P2, D2), Pair(P1, D1), Pair(P2, D2)]


ROLES = st.sampled_from(list(Role))


@given(
    st.lists(st.tuples(ROLES, st.booleans(), st.integers(0, 3), st.booleans()), max_size=8),
    st.booleans(),
    st.integers(),
    st.booleans(),
)
def test_every_decision_keeps_the_rules(
    drawn: list[tuple[Role, bool, int, bool]], is_whole: bool, seed: int, turns: bool
) -> None:
    engines = [engine(str(n), role, load) for n, (role, _, load, _) in enumerate(drawn)]
    view = ClusterView(engines)
    for one, (_, usable, _, _) in zip(engines, drawn, strict=True):
        view.update(one, is_usable=usable)
    failed = [one for one, (_, _, _, bad) in zip(engines, drawn, strict=True) if bad]
    found = view.pools("m")
    if found is None:
        assert not engines  # an engine that ever served the model makes it known
        return
    policy: SchedulingPolicy = RoundRobin() if turns else LeastLoaded()
    pair = decide(RequestFacts("m", whole="w" if is_whole else None), found, policy, 0.0, Random(seed), failed)
    left = [one for one in engines if one.is_usable and one not in failed]
    if pair is None:
        assert not any(one.can_serve_alone for one in left)
        return
    assert pair.decode in left and pair.decode.can_serve_alone
    if pair.prefill is not None:
        assert pair.prefill in left and pair.prefill is not pair.decode and not is_whole and not pair.reason
        assert pair.prefill.can_prefill and pair.decode.can_decode
    elif pair.decode.role is not Role.COUPLED:
        assert pair.reason
        splits = not is_whole and any(a.can_prefill and b.can_decode for a in left for b in left if a is not b)
        assert not splits


def test_a_view_knows_which_models_can_be_answered() -> None:
    p, d, c = (Engine(n, r) for n, r in (("p", Role.PREFILL), ("d", Role.DECODE), ("c", Role.COUPLED)))
    view = ClusterView([p, d, c])
    assert view.pools("m") is None and not view.has_pair and not view.models
    view.update(p, is_usable=True, models=frozenset({"m"}))
    assert not view.has_pair and not view.models
    view.update(d, is_usable=True, models=frozenset({"m", "n"}), instance="i", addresses={"0,0": "h:1"})
    assert view.has_pair and view.models == {"m", "n"} and (d.instance, d.addresses) == ("i", {"0,0": "h:1"})
    view.update(p, is_usable=False)
    assert not view.has_pair
    view.update(c, is_usable=True, models=frozenset({"x"}))
    assert view.has_pair
    view.update(c, is_usable=False)
    assert view.pools("x") == Pools((), (), ())  # known, but away
    assert view.pools("never") is None


def test_a_view_refuses_an_engine_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        ClusterView([Engine("a", Role.BOTH), Engine("a", Role.BOTH)])


# --- health


def feed(machine: HealthMachine, *events: Event, now: float = 0.0) -> list[Action]:
    actions: list[Action] = []
    for event in events:
        actions = machine.handle(event, now)
    return actions


def state(machine: HealthMachine) -> Health:
    """The type checker must not think that it stays."""
    return machine.state


def up() -> HealthMachine:
    machine = HealthMachine(HealthOptions())
    assert feed(machine, GOOD) == [Action.DESCRIBE]
    assert feed(machine, Described()) == [Action.USE]
    return machine


def test_an_engine_is_used_after_it_described_itself() -> None:
    machine = HealthMachine(HealthOptions())
    assert machine.state is Health.JOINING
    assert feed(machine, BAD, BAD, BAD) == [] and machine.reason == "no answer"
    assert feed(machine, GOOD) == [Action.DESCRIBE]
    assert feed(machine, DescribeFailed("x")) == [] and machine.state is Health.JOINING
    assert feed(machine, GOOD, Described()) == [Action.USE]


def test_one_lost_probe_changes_nothing() -> None:
    machine = up()
    assert feed(machine, BAD, GOOD, BAD, GOOD, BAD) == [] and state(machine) is Health.UP
    assert feed(machine, BAD) == [Action.AVOID] and state(machine) is Health.DOWN
    assert feed(machine, GOOD) == []
    assert feed(machine, GOOD) == [Action.DESCRIBE]
    assert feed(machine, Described()) == [Action.USE]


def test_a_broken_connection_takes_an_engine_out_until_it_described_itself() -> None:
    machine = up()
    assert feed(machine, BROKEN) == [Action.AVOID, Action.PROBE] and state(machine) is Health.SUSPECT
    assert feed(machine, BROKEN) == []
    assert feed(machine, GOOD) == [Action.DESCRIBE]
    assert feed(machine, Described()) == [Action.USE]
    assert feed(machine, BROKEN, BAD) == [] and state(machine) is Health.DOWN


def test_other_failures_only_ask_for_a_probe() -> None:
    machine = up()
    assert feed(machine, TrafficFailed("HTTP 500", is_connection=False)) == [Action.PROBE]
    assert machine.state is Health.UP
    assert feed(machine, BAD, BAD, TrafficFailed("HTTP 500", is_connection=False)) == []


def test_a_hint_leads_to_a_description_but_not_at_once() -> None:
    machine = up()
    assert feed(machine, Verify()) == []
    assert feed(machine, GOOD, now=9.0) == []
    assert feed(machine, GOOD, now=10.0) == [Action.DESCRIBE]
    assert feed(machine, Described(), now=10.0) == [Action.USE]
    assert feed(machine, GOOD, now=100.0) == []


def test_a_refused_engine_is_asked_again_from_time_to_time() -> None:
    machine = up()
    assert feed(machine, Refused("dtype differs")) == [Action.AVOID]
    assert machine.state is Health.REFUSED and machine.reason == "dtype differs"
    assert feed(machine, GOOD, now=5.0) == []
    assert feed(machine, GOOD, now=10.0) == [Action.DESCRIBE]
    assert feed(machine, Described(), now=10.0) == [Action.USE]


EVENTS = st.sampled_from(
    [GOOD, BAD, BROKEN, TrafficFailed("x", is_connection=False), Verify(), DescribeFailed("x"), Refused("x")]
)


@given(st.lists(EVENTS, max_size=40))
def test_use_and_avoid_alternate_and_only_described_engines_are_used(events: list[Event]) -> None:
    machine, is_used, wants = HealthMachine(HealthOptions(redescribe_s=0.0)), False, False
    for now, event in enumerate(events):
        for action in machine.handle(event, float(now)):
            wants = wants or action is Action.DESCRIBE
            if action is Action.AVOID:
                assert is_used
                is_used = False
        if wants and isinstance(event, Probed):
            wants = False
            assert Action.USE in machine.handle(Described(), float(now))
            is_used = True
        assert is_used == (machine.state is Health.UP)
