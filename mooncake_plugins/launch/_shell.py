"""The shell around the supervisor's state machine: processes, signals, time and print-outs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mooncake_plugins.errors import LaunchError
from mooncake_plugins.launch import _guard
from mooncake_plugins.launch._profile import Command, PartSpec
from mooncake_plugins.launch._ready import wait_until_ready
from mooncake_plugins.launch._supervisor import (
    Action,
    AllReady,
    Begin,
    Event,
    Exit,
    Interrupt,
    Kill,
    PartExited,
    PartReady,
    Say,
    ShowLog,
    Spawn,
    Supervisor,
    Terminate,
    Tick,
)

logger = logging.getLogger(__name__)

SHOWN_LOG_LINES = 25
_LOG_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Part:
    """A part with everything that its profile said about it.

    Args:
        spec: The part.
        command: What to execute.
        ready_url: What answers 200 when it can serve.
        needs: Names of the parts that must be ready before it is started.
    """

    spec: PartSpec
    command: Command
    ready_url: str
    needs: frozenset[str] = frozenset()


def supervise(
    parts: Sequence[Part],
    *,
    say: Callable[[str], None],
    all_ready: Callable[[], None] = lambda: None,
    spawned: Callable[[str, int], None] = lambda name, pid: None,
    ready_timeout_s: float = 600.0,
    grace_s: float = 20.0,
) -> int:
    """Start the parts, watch them until SIGINT, SIGTERM, SIGHUP or the death of one, then stop them all.

    Args:
        parts: In order of start; names are unique.
        say: Shows one line to the user.
        all_ready: Called once, when every part is ready.
        spawned: Called with each part's name and process group id.
        ready_timeout_s: How long each part may take to become ready.
        grace_s: From SIGTERM to SIGKILL.

    Returns:
        0 if it was stopped from outside and everything ended; 1 if a part died, was not ready in time, or could not be
        ended.

    Blocking: until everything has ended. Belongs in the main thread: it handles signals. When it returns, no process of
    the parts is left, unless it said so. When it raises, or this process is killed, the guards (`_guard`) stop them.
    """
    shell = _Shell(parts, say, all_ready, spawned, ready_timeout_s, grace_s)
    return asyncio.run(shell.run())


@dataclass(slots=True)
class _Running:
    """A started part: its guard process and the pipe that keeps it alive."""

    process: asyncio.subprocess.Process
    control: int


class _Shell:
    """Performs actions and collects events. Everything happens in one event loop."""

    def __init__(
        self,
        parts: Sequence[Part],
        say: Callable[[str], None],
        all_ready: Callable[[], None],
        spawned: Callable[[str, int], None],
        ready_timeout_s: float,
        grace_s: float,
    ) -> None:
        self._parts = {part.spec.name: part for part in parts}
        if len(self._parts) != len(parts):
            raise LaunchError(f"part names are not unique: {', '.join(part.spec.name for part in parts)}")
        needs = {name: part.needs for name, part in self._parts.items()}
        self._supervisor = Supervisor(needs, ready_timeout_s=ready_timeout_s, grace_s=grace_s)
        self._say, self._all_ready, self._spawned, self._grace_s = say, all_ready, spawned, grace_s
        self._running: dict[str, _Running] = {}
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._exit_code: int | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        with self._signals_as_events(loop):
            try:
                await self._perform_all(self._supervisor.handle(Begin(), loop.time()))
                while self._exit_code is None:
                    event = await self._next_event(loop)
                    await self._perform_all(self._supervisor.handle(event, loop.time()))
            finally:
                await self._release()
        return self._exit_code

    @contextlib.contextmanager
    def _signals_as_events(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup asks to survive the end of the terminal
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._events.put_nowait, Interrupt(number.name))
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    async def _next_event(self, loop: asyncio.AbstractEventLoop) -> Event:
        try:
            async with asyncio.timeout_at(self._supervisor.deadline):
                return await self._events.get()
        except TimeoutError:
            return Tick()

    async def _perform_all(self, actions: list[Action]) -> None:
        for action in actions:
            await self._perform(action)

    async def _perform(self, action: Action) -> None:
        match action:
            case Spawn(name):
                await self._spawn(self._parts[name])
            case Terminate(name):
                self._terminate(name)
            case Kill(name):
                self._kill(name)
            case Say(text):
                self._say(text)
            case ShowLog(name):
                self._show_log(self._parts[name].spec.log_path)
            case AllReady():
                self._all_ready()
            case Exit(code):
                self._exit_code = code

    async def _spawn(self, part: Part) -> None:
        name = part.spec.name
        self._say(f"{name} is starting (log: {part.spec.log_path})")
        try:
            running = await _start(part, self._grace_s)
        except OSError as error:
            self._events.put_nowait(PartExited(name, None, str(error)))
            return
        self._running[name] = running
        self._spawned(name, running.process.pid)
        self._tasks[name] = [
            asyncio.create_task(self._watch_exit(name, running), name=f"exit of {name}"),
            asyncio.create_task(self._watch_ready(name, part.ready_url), name=f"readiness of {name}"),
        ]

    async def _watch_exit(self, name: str, running: _Running) -> None:
        returncode = await running.process.wait()
        if returncode == -signal.SIGKILL:  # if it was the guard that was killed, it could not clean up
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGKILL)
        self._close_control(running)
        self._events.put_nowait(PartExited(name, returncode))

    async def _watch_ready(self, name: str, url: str) -> None:
        await wait_until_ready(url)
        self._events.put_nowait(PartReady(name))

    def _terminate(self, name: str) -> None:
        self._tasks[name][1].cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._running[name].process.pid, signal.SIGTERM)

    def _kill(self, name: str) -> None:
        running = self._running[name]
        if running.control >= 0:
            with contextlib.suppress(OSError):  # it has just ended
                os.write(running.control, b"K")

    def _show_log(self, path: Path) -> None:
        lines = last_lines(path, SHOWN_LOG_LINES)
        self._say(f"last lines of {path}:" if lines else f"{path} is empty")
        for line in lines:
            self._say(f"  | {line}")

    async def _release(self) -> None:
        """End what is left of tasks and pipes; closing a pipe makes its guard stop the part, should it still run."""
        tasks = [task for pair in self._tasks.values() for task in pair]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for running in self._running.values():
            self._close_control(running)

    @staticmethod
    def _close_control(running: _Running) -> None:
        if running.control >= 0:
            os.close(running.control)
            running.control = -1


async def _start(part: Part, grace_s: float) -> _Running:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    guard = [sys.executable, "-I", _guard.__file__, str(read_end), str(grace_s)]
    try:
        with open(part.spec.log_path, "ab") as log:
            process = await asyncio.create_subprocess_exec(
                *guard,
                *part.command.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(part),
                pass_fds=[read_end],
                start_new_session=True,
            )
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    return _Running(process, write_end)


def _environment(part: Part) -> dict[str, str]:
    environment = dict(os.environ) | {"MOONCAKE_SECRET_FILE": str(part.spec.secret_file)}
    if part.spec.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(part.spec.gpus)
    return environment | dict(part.command.env)


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a text file, without reading all of it; an absent file has none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return text.splitlines()[-count:]
