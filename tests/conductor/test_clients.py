"""Clients that leave or do not read, at each stage: engines are told, and nothing is left over."""

from __future__ import annotations

import asyncio

import pytest

from tests.conductor.conductor_cluster import Cluster, completion, scenario, until
from tests.conductor.simulated_engine import EVENTS, STREAM_HEAD, Connection, Received, SimulatedEngine, chunk


def engines(count: int, name: str) -> list[SimulatedEngine]:
    return [SimulatedEngine(instance=f"{name}-{number}") for number in range(count)]


@pytest.mark.parametrize("stage", ["prefill", "head", "streaming", "plain"])
@scenario
async def test_when_the_client_leaves_both_engines_are_told(stage: str) -> None:
    (p,), (d,) = engines(1, "p"), engines(1, "d")
    gone: list[str] = []
    begun = asyncio.Event()

    async def prefill(connection: Connection, received: Received) -> None:
        await connection.gone.wait()
        gone.append("prefill")

    async def decode(connection: Connection, received: Received) -> None:
        if stage in ("head", "streaming"):
            connection.write(STREAM_HEAD)
        if stage == "streaming":
            connection.write(chunk(EVENTS[0]))
        begun.set()
        await connection.gone.wait()
        gone.append("decode")

    p.behave, d.behave = prefill, decode
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        async with cluster.client() as client:
            client.ask(completion(stream=stage != "plain"))
            await begun.wait()
            if stage == "streaming":
                assert EVENTS[0] in await client.read()
            await until(lambda: len(p.seen) == 1)
        await until(lambda: len(gone) == 2)
        counters = await cluster.counters()
        assert counters["requests"]["/v1/completions 499"] == 1 and counters["retries"] == {}


@scenario
async def test_a_client_that_leaves_while_an_engine_is_being_dialled() -> None:
    (d,) = engines(1, "d")
    async with Cluster(coupled=[d], pool_connections=0) as cluster:
        for _ in range(20):
            async with cluster.client() as client:
                client.ask(completion())
                await asyncio.sleep(0)
        await until(cluster.is_quiet)
        assert (await cluster.post(completion())).status == 200


@scenario
async def test_a_client_that_leaves_in_the_middle_of_its_request() -> None:
    (d,) = engines(1, "d")
    async with Cluster(coupled=[d]) as cluster:
        async with cluster.client() as client:
            client.send(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            await client.writer.drain()
        assert (await cluster.post(completion())).status == 200
        assert len(d.seen) == 1


@scenario
async def test_a_slow_client_slows_its_engine_down() -> None:
    (d,) = engines(1, "d")
    piece, count = chunk(b"data: " + b"x" * 65_000 + b"\n\n"), 2500  # more than the kernel's buffers ever hold
    sent = 0

    async def flood(connection: Connection, received: Received) -> None:
        nonlocal sent
        connection.write(STREAM_HEAD)
        while sent < count and not connection.gone.is_set():
            if connection.transport.get_write_buffer_size() < 1 << 20:
                connection.write(piece)
                sent += 1
            await asyncio.sleep(0)
        connection.write(b"0\r\n\r\n")

    d.behave = flood
    async with Cluster(coupled=[d]) as cluster, cluster.client() as client:
        client.ask(completion(stream=True))
        before = -1
        while sent != before:  # nobody reads: the engine comes to a stop, with most of it unsent
            before = sent
            await asyncio.sleep(0.2)
        assert sent < count * 0.8
        total = 0
        while not (data := await client.read()).endswith(b"0\r\n\r\n"):
            assert data
            total += len(data)
        assert sent == count and total > count * 65_000


@scenario
async def test_a_client_that_never_reads_is_dropped() -> None:
    (d,) = engines(1, "d")
    gone = asyncio.Event()

    async def flood(connection: Connection, received: Received) -> None:
        connection.write(STREAM_HEAD)
        while not connection.gone.is_set():
            if connection.transport.get_write_buffer_size() < 1 << 20:
                connection.write(chunk(b"x" * 65_000))
            await asyncio.sleep(0)
        gone.set()

    async def begin(connection: Connection, received: Received) -> None:
        connection.engine.task = asyncio.create_task(flood(connection, received))  # type: ignore[attr-defined]

    d.behave = begin
    async with Cluster(coupled=[d], stall_s=0.4, between_bytes_s=0.2) as cluster, cluster.client() as client:
        client.ask(completion(stream=True))
        await gone.wait()
        await until(cluster.is_quiet)


@scenario
async def test_the_end_of_an_answer_reaches_a_slow_client_that_closes() -> None:
    (d,) = engines(1, "d")
    body = b"x" * 8_000_000

    async def big(connection: Connection, received: Received) -> None:
        connection.plain(body)

    d.behave = big
    async with Cluster(coupled=[d]) as cluster, cluster.client() as client:
        client.ask(completion(), headers="connection: close\r\n")
        await asyncio.sleep(2.5)  # longer than a connection lingers after an error
        assert (await client.answer()).body == body
