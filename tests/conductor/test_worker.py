"""The life of a Conductor process: ports, readiness, stopping."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from mooncake_conductor.core import LeastLoaded, Role
from mooncake_conductor.dialects import VllmDialect
from mooncake_conductor.worker import Addresses, ConductorConfig, serve

from mooncake_plugins.errors import ConductorError, ConfigError
from tests.conductor.conductor_cluster import Client, Cluster, completion, scenario, until
from tests.conductor.simulated_engine import EVENTS, PLAIN, STREAM_HEAD, Connection, Received, SimulatedEngine, chunk

CONSOLE_SCRIPT = [sys.executable, "-m", "mooncake_plugins.cli", "conductor"]


@scenario
async def test_stopping_lets_answers_in_flight_end() -> None:
    engine = SimulatedEngine()
    go_on = asyncio.Event()

    async def slow(connection: Connection, received: Received) -> None:
        connection.write(STREAM_HEAD + chunk(EVENTS[0]))
        await go_on.wait()
        connection.write(b"".join(map(chunk, EVENTS[1:])) + b"0\r\n\r\n")

    engine.behave = slow
    async with Cluster(coupled=[engine]) as cluster, cluster.client() as busy, cluster.client() as idle:
        idle.ask(None, "/health", method="GET")
        await idle.answer()
        busy.ask(completion(stream=True))
        data = await busy.read()
        stopping = asyncio.create_task(cluster.stop())
        assert await idle.closed()
        with pytest.raises(ConnectionError):
            await Client(cluster.url).__aenter__()
        go_on.set()
        while not data.endswith(b"0\r\n\r\n"):
            data += await busy.read()
        assert await busy.closed()
        await stopping


@scenario
async def test_stopping_ends_after_the_grace() -> None:
    engine = SimulatedEngine()

    async def never(connection: Connection, received: Received) -> None:
        await connection.gone.wait()

    engine.behave = never
    async with Cluster(coupled=[engine], grace_s=0.2) as cluster, cluster.client() as client:
        client.ask(completion())
        await until(lambda: bool(engine.seen))
        await cluster.stop()
        assert not (await client.answer()).is_complete


@scenario
async def test_the_ports_answer_while_engines_start() -> None:
    engine = SimulatedEngine(is_healthy=False)
    await engine.start()
    config = ConductorConfig(((Role.BOTH, engine.url),), LeastLoaded(), VllmDialect(), port=0, console_port=0)
    stop = asyncio.Event()
    task = asyncio.create_task(serve(config, stop))
    try:
        await until(lambda: bool(engine.connections))
        stop.set()  # a stop while waiting for engines is a normal end
        await task
    finally:
        await engine.stop()


@scenario
async def test_a_taken_port_is_an_error_that_names_the_option() -> None:
    taken = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    engines = ((Role.COUPLED, "http://127.0.0.1:1"),)
    for option, ports in (("--port", {"port": port}), ("--console-port", {"port": 0, "console_port": port})):
        config = ConductorConfig(engines, LeastLoaded(), VllmDialect(), **ports)
        with pytest.raises(ConductorError, match=rf"cannot listen on 127.0.0.1:{port}.*another with {option}$"):
            await serve(config, asyncio.Event())
    taken.close()
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("engines", "message"),
    [
        ((), "name some"),
        (((Role.PREFILL, "http://a:1"),), "needs a decode engine"),
        (((Role.DECODE, "http://a:1"),), "needs a prefill engine"),
    ],
)
def test_engines_that_make_no_pair_are_refused(engines: tuple[tuple[Role, str], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConductorConfig(engines, LeastLoaded(), VllmDialect())


@pytest.mark.parametrize(
    "url", ["", "a:1", "https://a:1", "http://", "http://a:b", "http://a:99999", "http://a:1/v1", "http://u@a:1"]
)
def test_urls_that_cannot_be_used(url: str) -> None:
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        ConductorConfig(((Role.BOTH, url),), LeastLoaded(), VllmDialect()).make_engines()


def test_an_engine_may_be_named_once() -> None:
    config = ConductorConfig(((Role.PREFILL, "http://a:80"), (Role.DECODE, "http://a/")), LeastLoaded(), VllmDialect())
    with pytest.raises(ConfigError, match="named twice"):
        config.make_engines()


def test_ipv6_engines() -> None:
    config = ConductorConfig(((Role.BOTH, "http://[::1]:8000/"),), LeastLoaded(), VllmDialect())
    ((engine, address),) = config.make_engines()
    assert (engine.name, address) == ("http://[::1]:8000", ("::1", 8000))


@scenario
async def test_the_command_serves_and_stops_on_a_signal(tmp_path: Path) -> None:
    p, d = await SimulatedEngine(role="prefill").start(), await SimulatedEngine(role="decode").start()
    addresses = tmp_path / "addresses.json"
    arguments = ["--prefill", p.url, "--decode", d.url, "--port", "0", "--console-port", "0"]
    process = await asyncio.create_subprocess_exec(
        *CONSOLE_SCRIPT,
        *arguments,
        "--address-file",
        str(addresses),
        env=_environment(),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        found = Addresses(**json.loads(addresses.read_text()))
        assert line == f"mooncake conductor: {found.url}/v1 (console {found.console})\n"
        async with Client(found.url) as client:
            client.ask(completion())
            assert (await client.answer()).body == PLAIN
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await p.stop()
        await d.stop()
        await asyncio.sleep(0.05)  # the loop closes the pipe of the child


@scenario
async def test_the_command_fails_with_one_sentence() -> None:
    process = await asyncio.create_subprocess_exec(
        *CONSOLE_SCRIPT,
        "--prefill",
        "ftp://x",
        "--decode",
        "http://y:1",
        env=_environment(),
        stderr=asyncio.subprocess.PIPE,
    )
    _, error = await process.communicate()
    assert process.returncode == 1
    assert (
        error.decode().lower().startswith("error: --prefill: 'ftp://x' is not usable") and len(error.splitlines()) == 1
    )
    await asyncio.sleep(0.05)


def _environment() -> dict[str, str]:
    """A checkout that is not installed still runs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOONCAKE_")}
    return kept | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
