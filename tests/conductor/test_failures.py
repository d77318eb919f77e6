"""Engines that fail, at each stage: another engine, or an honest end."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from mooncake_plugins.handoff import verify_ticket
from tests.conductor.conductor_cluster import KEY, Cluster, completion, scenario, until
from tests.conductor.simulated_engine import (
    EVENTS,
    PLAIN,
    STREAM_HEAD,
    Behaviour,
    Connection,
    Received,
    SimulatedEngine,
    chunk,
    normal,
)


async def reset(connection: Connection, received: Received) -> None:
    connection.reset()


async def unavailable(connection: Connection, received: Received) -> None:
    connection.plain(b'{"error":{"message":"busy"}}', 503)


async def nonsense(connection: Connection, received: Received) -> None:
    connection.write(b"SSH-2.0-OpenSSH_9.2\r\n")


async def head_then_reset(connection: Connection, received: Received) -> None:
    """As a real engine: the head comes at once, the first token never."""
    connection.write(STREAM_HEAD)
    await asyncio.sleep(0.01)
    connection.reset()


async def interim(connection: Connection, received: Received) -> None:
    connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def silent(connection: Connection, received: Received) -> None:
    await connection.gone.wait()


def engines(count: int, name: str) -> list[SimulatedEngine]:
    return [SimulatedEngine(instance=f"{name}-{number}") for number in range(count)]


def one_fails(failure: Behaviour) -> Behaviour:
    """The first engine that is asked fails from then on; those asked later are well."""
    bad: list[SimulatedEngine] = []

    async def behave(connection: Connection, received: Received) -> None:
        if not bad:
            bad.append(connection.engine)
        await (failure if connection.engine in bad else normal)(connection, received)

    return behave


FAILURES: list[Behaviour] = [reset, unavailable, nonsense, head_then_reset, interim]


@pytest.mark.parametrize("failure", FAILURES)
@scenario
async def test_a_failed_prefill_leg_is_replaced_with_a_fresh_ticket(failure: Behaviour) -> None:
    p, (d,) = engines(2, "p"), engines(1, "d")

    async def wait_for_second(connection: Connection, received: Received) -> None:
        if len(d.seen) == 1:
            await connection.gone.wait()  # the decode leg of the broken pair is given up
        connection.stream()

    p[0].behave = p[1].behave = one_fails(failure)
    d.behave = wait_for_second
    async with Cluster(prefill=p, decode=[d]) as cluster:
        answer = await cluster.post(completion(stream=True))
        assert (answer.status, answer.body) == (200, b"".join(EVENTS))
        await until(lambda: all(engine.seen for engine in p))
        tickets = [verify_ticket((r.params or {})["ticket"], KEY, time.time()) for r in d.seen]
        assert tickets[0].id != tickets[1].id and {t.prefill for t in tickets} == {"p-0", "p-1"}
        counters = await cluster.counters()
        assert counters["retries"] == {"prefill": 1} and counters["pairs"] == 2


@pytest.mark.parametrize("failure", FAILURES)
@scenario
async def test_without_another_prefill_engine_decode_computes_alone(failure: Behaviour) -> None:
    (p,), (d,) = engines(1, "p"), engines(1, "d")

    async def only_alone(connection: Connection, received: Received) -> None:
        if received.params is not None:
            await connection.gone.wait()
        connection.plain()

    p.behave, d.behave = failure, only_alone
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        assert (await cluster.post(completion())).body == PLAIN
        assert d.seen[-1].json == completion()
        assert (await cluster.counters())["fallbacks"] == {"prefill_failed": 1}


@pytest.mark.parametrize("failure", FAILURES)
@scenario
async def test_a_failed_decode_leg_is_replaced_together_with_its_prefill(failure: Behaviour) -> None:
    (p,), d = engines(1, "p"), engines(2, "d")
    p_gone = 0

    async def slow_prefill(connection: Connection, received: Received) -> None:
        nonlocal p_gone
        if len(p.seen) == 1:
            await connection.gone.wait()
            p_gone += 1
        connection.plain()

    p.behave = slow_prefill
    d[0].behave = d[1].behave = one_fails(failure)
    async with Cluster(prefill=[p], decode=d) as cluster:
        assert (await cluster.post(completion(stream=True))).body == b"".join(EVENTS)
        await until(lambda: all(engine.seen for engine in d) and len(p.seen) == 2 and p_gone == 1)
        assert (await cluster.counters())["retries"] == {"decode": 1}


@scenario
async def test_when_every_engine_fails_the_client_is_told() -> None:
    p, d = engines(2, "p"), engines(2, "d")
    for engine in (*p, *d):
        engine.behave = reset
    async with Cluster(prefill=p, decode=d, retries=5) as cluster:
        answer = await cluster.post(completion())
        assert answer.status in (502, 503) and answer.error["type"] == "server_error"
        assert all(engine.url not in answer.body.decode() for engine in (*p, *d))


@scenario
async def test_attempts_are_bounded() -> None:
    d = engines(5, "d")
    for engine in d:
        engine.behave = unavailable
    async with Cluster(coupled=d, retries=2) as cluster:
        answer = await cluster.post(completion())
        assert (answer.status, answer.json) == (503, {"error": {"message": "busy"}})  # the engine's own words
        assert sum(len(engine.seen) for engine in d) == 3


@scenario
async def test_a_refused_connection_is_retried_and_the_engine_left_out() -> None:
    good, bad = engines(2, "d")
    async with Cluster(coupled=[good, bad]) as cluster:
        await bad.stop()
        for _ in range(8):
            assert (await cluster.post(completion())).status == 200
        await until(lambda: _has_health(cluster, bad, "down"))


async def _has_health(cluster: Cluster, engine: SimulatedEngine, health: str) -> bool:
    return await cluster.health(engine) == health


@scenario
async def test_a_stale_pooled_connection_is_replaced_unseen() -> None:
    (d,) = engines(1, "d")
    async with Cluster(coupled=[d], pool_idle_s=60.0, health_interval_s=30.0) as cluster:
        assert (await cluster.post(completion())).status == 200
        stale = set(d.connections)

        async def closed_once(connection: Connection, received: Received) -> None:
            if connection in stale:
                connection.reset()
            else:
                connection.plain()

        d.behave = closed_once
        assert (await cluster.post(completion())).status == 200
        counters = await cluster.counters()
        assert counters["retries"] == {} and counters["leg_failures"] == {}
        assert len(d.seen) == 3


@pytest.mark.parametrize("stream", [False, True])
@scenario
async def test_a_client_error_of_decode_is_relayed_and_prefill_given_up(stream: bool) -> None:
    (p,), (d,) = engines(1, "p"), engines(1, "d")
    error = b'{"error":{"message":"max_tokens is too large","code":400}}'
    given_up = asyncio.Event()

    async def refuse(connection: Connection, received: Received) -> None:
        connection.plain(error, 400)

    async def hold(connection: Connection, received: Received) -> None:
        await connection.gone.wait()
        given_up.set()

    p.behave, d.behave = hold, refuse
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        answer = await cluster.post(completion(stream=stream))
        assert (answer.status, answer.body) == (400, error)
        await given_up.wait()
        assert (await cluster.counters())["retries"] == {}


@scenario
async def test_a_client_error_of_prefill_is_relayed_and_decode_given_up() -> None:
    (p,), (d,) = engines(1, "p"), engines(1, "d")
    error = b'{"error":{"message":"unknown field","code":400}}'
    given_up = asyncio.Event()

    async def refuse(connection: Connection, received: Received) -> None:
        connection.plain(error, 422)

    async def hold(connection: Connection, received: Received) -> None:
        connection.write(STREAM_HEAD)
        await connection.gone.wait()
        given_up.set()

    p.behave, d.behave = refuse, hold
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        answer = await cluster.post(completion(stream=True))
        assert (answer.status, answer.body) == (422, error)
        await given_up.wait()


@scenario
async def test_a_prefill_that_dies_after_the_first_token_does_not_matter() -> None:
    (p,), (d,) = engines(1, "p"), engines(1, "d")
    streaming, dead = asyncio.Event(), asyncio.Event()

    async def die_later(connection: Connection, received: Received) -> None:
        await streaming.wait()
        connection.reset()
        dead.set()

    async def stream(connection: Connection, received: Received) -> None:
        connection.write(STREAM_HEAD + chunk(EVENTS[0]))
        await dead.wait()
        connection.write(b"".join(map(chunk, EVENTS[1:])) + b"0\r\n\r\n")

    p.behave, d.behave = die_later, stream
    async with Cluster(prefill=[p], decode=[d]) as cluster, cluster.client() as client:
        client.ask(completion(stream=True))
        first = await client.read()
        streaming.set()
        while not first.endswith(b"0\r\n\r\n"):
            first += await client.read()
        assert first == STREAM_HEAD + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"
        assert (await cluster.counters())["retries"] == {}


@scenario
async def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    (p,), (d,) = engines(1, "p"), engines(1, "d")

    async def break_off(connection: Connection, received: Received) -> None:
        connection.write(STREAM_HEAD + chunk(EVENTS[0]))
        await asyncio.sleep(0.01)
        connection.reset()

    d.behave = break_off
    async with Cluster(prefill=[p], decode=[d]) as cluster, cluster.client() as client:
        client.ask(completion(stream=True))
        answer = await client.answer()
        assert answer.is_complete and answer.status == 200
        first, last = answer.body[: len(EVENTS[0])], answer.body[len(EVENTS[0]) :]
        assert first == EVENTS[0]
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert last.endswith(b"\n\n") and error["code"] == "engine_failed" and error["type"] == "server_error"
        assert await client.closed()
        assert (await cluster.counters())["cut_answers"] == 1


@pytest.mark.parametrize("tail", [b"20\r\ndata: half", b"2", b"20\r", chunk(EVENTS[1])[:-1]])
@scenario
async def test_a_stream_that_breaks_inside_a_chunk_ends_without_looking_complete(tail: bytes) -> None:
    (d,) = engines(1, "d")

    async def break_off(connection: Connection, received: Received) -> None:
        connection.write(STREAM_HEAD + chunk(EVENTS[0]) + tail)
        await asyncio.sleep(0.01)
        connection.reset()

    d.behave = break_off
    async with Cluster(coupled=[d]) as cluster:
        answer = await cluster.post(completion(stream=True))
        assert not answer.is_complete and b"error" not in answer.raw


@scenario
async def test_a_plain_answer_that_breaks_does_not_look_complete() -> None:
    (d,) = engines(1, "d")

    async def break_off(connection: Connection, received: Received) -> None:
        connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
        await asyncio.sleep(0.01)
        connection.reset()

    d.behave = break_off
    async with Cluster(coupled=[d]) as cluster:
        answer = await cluster.post(completion())
        assert answer.status == 200 and not answer.is_complete


@scenario
async def test_bytes_after_an_answer_are_not_passed_on() -> None:
    (d,) = engines(1, "d")

    async def too_much(connection: Connection, received: Received) -> None:
        connection.write(
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nextra"
        )

    d.behave = too_much
    async with Cluster(coupled=[d]) as cluster:
        assert b"extra" not in (await cluster.post(completion())).raw


@scenario
async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    (d,) = engines(1, "d")

    async def until_close(connection: Connection, received: Received) -> None:
        connection.write(
            b"HTTP/1.1 200 OK\r\nconnection: close\r\nkeep-alive: x\r\ncontent-type: text/plain\r\n\r\nhello"
        )
        await asyncio.sleep(0.01)
        connection.transport.close()

    d.behave = until_close
    async with Cluster(coupled=[d]) as cluster:
        answer = await cluster.post(completion())
        assert (answer.status, answer.body, answer.headers) == (
            200,
            b"hello",
            {"content-type": "text/plain", "connection": "close"},
        )
        assert (await cluster.counters())["leg_failures"] == {}


@scenario
async def test_an_engine_that_closes_after_each_answer_does_not_close_the_client() -> None:
    (d,) = engines(1, "d")

    async def close(connection: Connection, received: Received) -> None:
        connection.plain(extra=b"Connection: close\r\n")
        connection.transport.close()

    d.behave = close
    async with Cluster(coupled=[d]) as cluster, cluster.client() as client:
        for _ in range(3):
            client.ask(completion())
            answer = await client.answer()
            assert answer.body == PLAIN and "connection" not in answer.headers


# --- deadlines


@scenario
async def test_no_first_byte_in_time() -> None:
    p, d = engines(1, "p"), engines(1, "d")
    p[0].behave = d[0].behave = silent
    async with Cluster(prefill=p, decode=d, first_byte_s=0.3) as cluster:
        answer = await cluster.post(completion(stream=True))
        assert (answer.status, answer.error["type"]) == (504, "timeout")
        await until(cluster.is_quiet)


@scenario
async def test_no_answer_in_time() -> None:
    (d,) = engines(1, "d")
    d.behave = silent
    async with Cluster(coupled=[d], total_s=0.3) as cluster:
        assert (await cluster.post(completion())).status == 504


@pytest.mark.parametrize("options", [{"between_bytes_s": 0.3}, {"total_s": 0.5}])
@scenario
async def test_a_stream_that_stops(options: dict[str, Any]) -> None:
    (d,) = engines(1, "d")

    async def stop(connection: Connection, received: Received) -> None:
        connection.write(STREAM_HEAD + chunk(EVENTS[0]))
        await connection.gone.wait()

    d.behave = stop
    async with Cluster(coupled=[d], **options) as cluster:
        answer = await cluster.post(completion(stream=True))
        assert answer.is_complete and b'"engine_failed"' in answer.body


@scenario
async def test_an_engine_that_does_not_accept_connections() -> None:
    good, bad = engines(2, "d")
    async with Cluster(coupled=[good, bad], connect_s=0.3, health_interval_s=60.0) as cluster:
        await bad.stop()
        for _ in range(4):
            assert (await cluster.post(completion())).status == 200
