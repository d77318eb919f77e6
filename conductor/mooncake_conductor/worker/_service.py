"""Starts a Conductor, keeps it running until it is told to stop, and ends it without losing an answer."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, NamedTuple

import msgspec

from mooncake_conductor.console import Console
from mooncake_conductor.core import ClusterView
from mooncake_conductor.proxy import (
    ClientConnection,
    EnginePool,
    Frontend,
    Membership,
    Metrics,
    Site,
    load_httptools,
)
from mooncake_conductor.worker._config import ConductorConfig
from mooncake_plugins.errors import ConductorError

logger = logging.getLogger(__name__)

_TICK_S = 0.1
_BACKLOG = 4096


class Addresses(NamedTuple):
    """Where a Conductor listens."""

    url: str
    console: str


async def serve(
    config: ConductorConfig, stop: asyncio.Event, on_ready: Callable[[Addresses], None] = lambda _: None
) -> None:
    """Run a Conductor until ``stop`` is set; then finish what is in flight, at most ``grace_s``.

    Both ports are open from the beginning, so that a taken port is found before anything waits; ``/health`` says 503
    until the engines have described themselves.

    Args:
        config: See there.
        stop: Set by whoever wants it to end.
        on_ready: Called once, when requests can be served.

    Raises:
        ConfigError: A port cannot be used.
        FingerprintError, ConductorError: The engines do not fit together, or do not answer.
    """
    conductor = Conductor(config)
    try:
        await conductor.open()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work, name=name) for name, work in conductor.work()]
            main = group.create_task(conductor.run(stop, on_ready), name="conductor")
            main.add_done_callback(lambda _: [task.cancel() for task in tasks])
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    finally:
        await conductor.close()


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Conductor:
    """One worker: its listening sockets, connections and tasks. Belongs to one event loop."""

    def __init__(self, config: ConductorConfig) -> None:
        self._config, self._loop = config, asyncio.get_running_loop()
        tools, options, self.metrics = load_httptools(), config.options, Metrics()
        engines = config.make_engines()
        credentials = b"Bearer " + config.engine_key if config.engine_key else b""
        self.view = ClusterView(engine for engine, _ in engines)
        self.front = Frontend(
            self.view,
            config.policy,
            config.dialect,
            tools=tools,
            options=options,
            metrics=self.metrics,
            key=config.key,
            now=self._loop.time,
            rng=Random(),
        )
        for engine, address in engines:
            self.front.pools[engine] = EnginePool(engine, address, tools, options, self.metrics, credentials)
        self.membership = Membership(self.view, self.front.pools, config.dialect, options)
        self.front.on_failure = self.membership.traffic_failed
        self.front.list_models = self.membership.list_models
        self.console = Console(self.metrics, self.view, self.membership.state, tools, options, config.console_key)
        self._servers: list[asyncio.Server] = []

    async def open(self) -> None:
        """Listen on both ports.

        Raises:
            ConductorError: A port is taken or the host is not one of this machine's.
        """
        config = self._config
        url = await self._listen(self.front, config.host, config.port, "--port")
        console = await self._listen(self.console, config.console_host, config.console_port, "--console-port")
        self.addresses = Addresses(url, console)

    async def _listen(self, site: Site, host: str, port: int, option: str) -> str:
        try:
            server = await self._loop.create_server(
                lambda: ClientConnection(site, self._loop), host, port, backlog=_BACKLOG
            )
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConductorError(f"cannot listen on {host}:{port} ({reason}); choose another with {option}") from error
        self._servers.append(server)
        bound = server.sockets[0].getsockname()[1]
        return f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}"

    def work(self) -> list[tuple[str, Coroutine[Any, Any, None]]]:
        """Names and coroutines that run until the end."""
        watches = [(f"watch {m.engine.name}", self.membership.watch(m)) for m in self.membership.members.values()]
        return [("tick", self._tick()), *watches]

    async def run(self, stop: asyncio.Event, on_ready: Callable[[Addresses], None]) -> None:
        """Wait for the engines, then for ``stop``, then for requests in flight."""
        stopped = asyncio.create_task(stop.wait())
        ready = asyncio.create_task(self.membership.ready())
        try:
            await asyncio.wait({stopped, ready}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                self._announce()
                on_ready(self.addresses)
                await stopped
        finally:
            for task in (stopped, ready):
                task.cancel()
            await asyncio.gather(stopped, ready, return_exceptions=True)
        await self._drain()

    def _announce(self) -> None:
        logger.info("ready url=%s console=%s", *self.addresses)
        path = self._config.address_file
        if path is not None:
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(msgspec.json.encode(self.addresses._asdict()))
            os.replace(partial, path)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self.front.tick()
                self.console.tick(self._loop.time())
            except Exception:
                logger.exception("a deadline was not applied")

    async def _drain(self) -> None:
        """Stop accepting; let answers in flight end."""
        for server in self._servers:
            server.close()
        self.front.is_draining = True
        logger.info("stopping in_flight=%d grace_s=%g", len(self.front.active), self._config.options.grace_s)
        deadline = self._loop.time() + self._config.options.grace_s
        while self._loop.time() < deadline:
            for client in list(self.front.clients):
                client.close_if_idle()
            if not self.front.active and not self.front.clients:
                return
            await asyncio.sleep(0.02)
        logger.warning("grace is over, requests were cut off in_flight=%d", len(self.front.active))

    async def close(self) -> None:
        """Close everything at once. Idempotent."""
        for server in self._servers:
            server.close()
        for client in [*self.front.clients, *self.console.clients]:
            client.abort()
        for pool in self.front.pools.values():
            await pool.close()
        for _ in range(100):  # connections are gone when the loop has called them
            if (
                not self.front.clients
                and not self.console.clients
                and not any(p.links for p in self.front.pools.values())
            ):
                break
            await asyncio.sleep(0.01)
