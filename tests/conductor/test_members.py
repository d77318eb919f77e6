"""Who may join: descriptions, fingerprints, engines that die and come back."""

from __future__ import annotations

import time

import pytest

from mooncake_plugins.errors import ConductorError, FingerprintError
from mooncake_plugins.handoff import Ticket, verify_ticket
from tests.conductor.conductor_cluster import KEY, Cluster, completion, scenario, until
from tests.conductor.simulated_engine import FINGERPRINT, Connection, Received, SimulatedEngine


async def has(cluster: Cluster, engine: SimulatedEngine, health: str) -> bool:
    return await cluster.health(engine) == health


@scenario
async def test_engines_with_different_fingerprints_are_refused_with_both_values() -> None:
    p = SimulatedEngine(instance="p")
    d = SimulatedEngine(instance="d", fingerprint={**FINGERPRINT, "dtype": "float16", "block_size": 32})
    with pytest.raises(FingerprintError) as caught:
        async with Cluster(prefill=[p], decode=[d]):
            pass
    text = str(caught.value)
    for value in ("'bfloat16'", "'float16'", "16", "32", "dtype", "block_size", p.url, d.url):
        assert value in text
    assert set(caught.value.differences) == {"dtype", "block_size"}


@scenario
async def test_an_engine_without_the_connector_is_refused_with_a_remedy() -> None:
    d = SimulatedEngine(has_connector=False)
    with pytest.raises(ConductorError, match=r"has no mooncake connector.*--kv-connector mooncake") as caught:
        async with Cluster(prefill=[SimulatedEngine()], decode=[d]):
            pass
    assert d.url in str(caught.value)


@pytest.mark.parametrize(("given", "runs"), [("prefill", "decode"), ("decode", "prefill"), ("both", "decode")])
@scenario
async def test_an_engine_in_the_wrong_role_is_refused(given: str, runs: str) -> None:
    roles = {"prefill": [SimulatedEngine()], "decode": [SimulatedEngine()]}
    wrong = SimulatedEngine(role=runs)
    roles[given] = [wrong]
    with pytest.raises(ConductorError, match=f"given as --{given}, but runs with --kv-role {runs}"):
        async with Cluster(**roles):  # type: ignore[arg-type]
            pass


@scenario
async def test_an_engine_with_another_protocol_version_is_refused() -> None:
    d = SimulatedEngine(version=9)
    with pytest.raises(ConductorError, match="version 9"):
        async with Cluster(both=[d]):
            pass


@scenario
async def test_a_start_without_engines_ends_in_time_and_says_who_is_missing() -> None:
    p, d = SimulatedEngine(), SimulatedEngine()
    await d.start()
    await d.stop()
    with pytest.raises(ConductorError, match="not ready after 0.5 s") as caught:
        async with Cluster(prefill=[p], decode=[d], startup_s=0.5):
            pass
    assert d.url in str(caught.value) and p.url not in str(caught.value)
    assert "cannot be reached" in str(caught.value)


@scenario
async def test_a_start_goes_on_without_an_engine_that_is_not_needed() -> None:
    p, d, missing = SimulatedEngine(), SimulatedEngine(), SimulatedEngine()
    await missing.start()
    await missing.stop()
    async with Cluster(prefill=[p, missing], decode=[d], startup_s=0.5) as cluster:
        assert (await cluster.post(completion())).status == 200
        assert await cluster.health(missing) == "joining"


@scenario
async def test_an_engine_that_is_slow_to_start_is_waited_for() -> None:
    engine = SimulatedEngine(is_healthy=False)
    cluster = Cluster(both=[engine], wait=False)
    async with cluster:
        await until(lambda: bool(engine.connections))
        engine.is_healthy = True
        await until(lambda: engine.described > 0)


@scenario
async def test_a_restarted_engine_is_described_again_before_it_is_used() -> None:
    p, d = SimulatedEngine(instance="p-1"), SimulatedEngine(instance="d-1")
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        await cluster.post(completion())
        assert ticket(d).prefill == "p-1"
        await p.stop()
        assert (await cluster.post(completion())).status == 200
        assert d.seen[-1].params is None  # decode computed alone
        await until(lambda: has(cluster, p, "down"))
        p.instance = "p-2"
        await p.start()
        await until(lambda: has(cluster, p, "up"))
        await cluster.post(completion())
        assert ticket(d).prefill == "p-2"


@scenario
async def test_an_engine_that_was_replaced_unnoticed_is_described_again_soon() -> None:
    """Its idle connections ended: nothing was lost, but the process may be another one."""
    p, d = SimulatedEngine(instance="p-1"), SimulatedEngine(instance="d-1")
    async with Cluster(prefill=[p], decode=[d], pool_idle_s=60.0, redescribe_s=0.1) as cluster:
        await cluster.post(completion())
        p.instance = "p-2"
        for connection in list(p.connections):
            connection.transport.close()
        await until(lambda: p.described > 1)
        await cluster.post(completion())
        assert ticket(d).prefill == "p-2"
        assert (await cluster.counters())["leg_failures"] == {}


def ticket(engine: SimulatedEngine) -> Ticket:
    return verify_ticket((engine.seen[-1].params or {})["ticket"], KEY, time.time())


@scenario
async def test_an_engine_that_comes_back_different_is_kept_out() -> None:
    p, d1, d2 = SimulatedEngine(), SimulatedEngine(), SimulatedEngine()
    async with Cluster(prefill=[p], decode=[d1, d2]) as cluster:
        await d2.stop()
        await until(lambda: has(cluster, d2, "down"))
        d2.fingerprint = {**FINGERPRINT, "model": "other"}
        await d2.start()
        await until(lambda: has(cluster, d2, "refused"))
        d2.seen.clear()
        for _ in range(4):
            assert (await cluster.post(completion())).status == 200
        assert not d2.seen
        (shown,) = [e for e in (await cluster.state())["engines"] if e["url"] == d2.url]
        assert "'abc'" in shown["reason"] and "'other'" in shown["reason"]
        await d2.stop()  # it is replaced by one that fits
        await until(lambda: has(cluster, d2, "down"))
        d2.fingerprint = dict(FINGERPRINT)
        await d2.start()
        await until(lambda: has(cluster, d2, "up"))


@scenario
async def test_health_has_hysteresis() -> None:
    a, b = SimulatedEngine(), SimulatedEngine()
    async with Cluster(coupled=[a, b]) as cluster:
        a.is_healthy = False
        await until(lambda: has(cluster, a, "down"))
        a.seen.clear()
        for _ in range(4):
            assert (await cluster.post(completion())).status == 200
        assert not a.seen
        a.is_healthy = True
        await until(lambda: has(cluster, a, "up"))


@scenario
async def test_when_no_engine_is_left_requests_are_refused_at_once() -> None:
    (engine,) = [SimulatedEngine()]
    async with Cluster(coupled=[engine]) as cluster:
        await engine.stop()
        await until(lambda: has(cluster, engine, "down"))
        answer = await cluster.post(completion())
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "no_engine", "1")
        answer = await cluster.post(completion(model="never seen"))
        assert answer.status == 503  # it is not known whether the model exists


@scenario
async def test_a_describe_probe_that_fails_is_repeated() -> None:
    engine = SimulatedEngine()
    real, calls = engine.answer, 0

    async def fail_first(connection: Connection, received: Received) -> None:
        nonlocal calls
        if ((received.body and received.params) or {}).get("role") == "describe":
            calls += 1
            if calls == 1:
                connection.plain(b"{}", 500)
                return
            if calls == 2:
                connection.reset()
                return
        await real(connection, received)

    engine.answer = fail_first  # type: ignore[method-assign]
    async with Cluster(both=[engine]):
        assert calls >= 3
