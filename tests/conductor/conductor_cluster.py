"""A Conductor in front of simulated engines inside one event loop, and a client that shows every byte."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, ParamSpec, Self

import httptools
from mooncake_conductor.core import LeastLoaded, Role, SchedulingPolicy
from mooncake_conductor.dialects import VllmDialect
from mooncake_conductor.proxy import ProxyOptions
from mooncake_conductor.worker import Addresses, ConductorConfig, run, serve

from tests.conductor.simulated_engine import MODEL, SimulatedEngine

P = ParamSpec("P")
KEY = b"k" * 32
LIMIT_S = 30.0


def scenario(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on uvloop, with a deadline; a task or a file descriptor that is left over fails it."""

    @functools.wraps(test)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        async def main() -> None:
            async with asyncio.timeout(LIMIT_S):
                await test(*args, **kwargs)
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
            await asyncio.sleep(0)
            assert not [task for task in left if not task.done()], "tasks were left over"

        run(asyncio.sleep(0))  # whatever libraries open once and keep
        before = _descriptors()
        run(main())
        left = _descriptors() - before
        assert not left, f"file descriptors were left open: {left}"

    return wrapper


def _descriptors() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return {entry for entry in found if "/proc/" not in entry}


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str = "condition") -> None:
    """Wait until something holds; the test's own deadline bounds it."""
    while True:
        value = condition()
        if value if isinstance(value, bool) else await value:
            return
        await asyncio.sleep(0.005)


class Answer:
    """One answer: parsed, and raw as it came."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.raw = b""
        self.status = 0
        self.is_complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, data: bytes) -> None:
        self.parts.append(data)

    def on_message_complete(self) -> None:
        self.is_complete = True

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


class Client:
    """One connection to the Conductor."""

    def __init__(self, url: str) -> None:
        self.address = url.removeprefix("http://").split(":")

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection(self.address[0], int(self.address[1]), limit=1 << 16)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()
        await asyncio.sleep(0)

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def ask(self, body: Any = None, path: str = "/v1/completions", headers: str = "", method: str = "POST") -> None:
        """Send one request; ``body`` is JSON, or bytes."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        kind = "content-type: application/json\r\n" if method == "POST" else ""
        head = f"{method} {path} HTTP/1.1\r\nhost: test\r\n{kind}{headers}content-length: {len(data)}\r\n\r\n"
        self.send(head.encode() + data)

    async def answer(self) -> Answer:
        """Read one answer; ``is_complete`` is False if the connection ended first."""
        answer = Answer()
        parser = httptools.HttpResponseParser(answer)
        while not answer.is_complete:
            data = await self.read()
            if not data:
                break
            answer.raw += data
            parser.feed_data(data)
        answer.status = parser.get_status_code()
        if answer.status and "content-length" not in answer.headers and "transfer-encoding" not in answer.headers:
            answer.is_complete = True
        return answer

    async def read(self) -> bytes:
        try:
            return await self.reader.read(1 << 16)
        except ConnectionError:
            return b""

    async def closed(self) -> bool:
        """Read until the Conductor closes; True if nothing more came."""
        return await self.read() == b""


class Cluster:
    """``async with Cluster(prefill=[engine], decode=[engine]) as cluster``."""

    def __init__(
        self,
        *,
        prefill: list[SimulatedEngine] | None = None,
        decode: list[SimulatedEngine] | None = None,
        both: list[SimulatedEngine] | None = None,
        coupled: list[SimulatedEngine] | None = None,
        policy: SchedulingPolicy | None = None,
        console_key: bytes = b"",
        engine_key: bytes = b"",
        wait: bool = True,
        **options: Any,
    ) -> None:
        self._roles = {
            Role.PREFILL: prefill or [],
            Role.DECODE: decode or [],
            Role.BOTH: both or [],
            Role.COUPLED: coupled or [],
        }
        for engine in self._roles[Role.PREFILL]:
            engine.role = "prefill" if engine.role == "both" else engine.role
        for engine in self._roles[Role.DECODE]:
            engine.role = "decode" if engine.role == "both" else engine.role
        self._policy, self._wait = policy or LeastLoaded(), wait
        self._console_key, self._engine_key = console_key, engine_key
        defaults = {"health_interval_s": 0.05, "startup_s": 5.0, "grace_s": 5.0, "connect_s": 2.0}
        self._options = ProxyOptions(**{**defaults, **options})
        self._stop = asyncio.Event()
        self._stack = AsyncExitStack()

    @property
    def engines(self) -> list[SimulatedEngine]:
        return [engine for engines in self._roles.values() for engine in engines]

    async def __aenter__(self) -> Self:
        for engine in self.engines:
            if not engine.port:
                await engine.start()
        self.config = ConductorConfig(
            engines=tuple((role, engine.url) for role, engines in self._roles.items() for engine in engines),
            policy=self._policy,
            dialect=VllmDialect(),
            port=0,
            console_port=0,
            key=KEY,
            engine_key=self._engine_key,
            console_key=self._console_key,
            options=self._options,
        )
        ready: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(serve(self.config, self._stop, ready.set_result))
        try:
            if self._wait:
                waiting: set[asyncio.Future[Any]] = {self.task, ready}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if self.task.done():
                    self.task.result()
                self.url, self.console = ready.result()
        except BaseException:
            ready.cancel()
            await self._close_engines()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._wait and kind is None and not self.task.done():
                await until(self.is_quiet, "legs ended")
            await self.stop()
        finally:
            await self._close_engines()

    async def stop(self) -> None:
        self._stop.set()
        await self.task

    async def _close_engines(self) -> None:
        for engine in self.engines:
            await engine.stop()

    # --- requests

    def client(self) -> Client:
        return Client(self.url)

    async def post(self, body: Any, path: str = "/v1/completions", headers: str = "") -> Answer:
        """One request on a connection of its own."""
        async with self.client() as client:
            client.ask(body, path, headers)
            return await client.answer()

    async def get(self, path: str, *, console: bool = False, headers: str = "") -> Answer:
        async with Client(self.console if console else self.url) as client:
            client.ask(None, path, headers, method="GET")
            return await client.answer()

    async def state(self) -> Any:
        headers = f"authorization: Bearer {self._console_key.decode()}\r\n" if self._console_key else ""
        return (await self.get("/state", console=True, headers=headers)).json

    async def counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = (await self.state())["counters"]
        return counters

    async def health(self, engine: SimulatedEngine) -> str:
        states = {e["url"]: e["health"] for e in (await self.state())["engines"]}
        return str(states[engine.url])

    async def is_quiet(self) -> bool:
        """No leg is open: every path gave back what it took."""
        return all(engine["in_flight"] == 0 for engine in (await self.state())["engines"])


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Say hello", "max_tokens": 8} | fields
