"""Runs the real ``mooncake up`` with toy engines, and finds what it leaves behind."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = Path(__file__).parent / "plugin"
PATIENCE_S = 60.0


def processes_of(run_dir: Path) -> list[str]:
    """The command lines of all processes that name this run directory, except ``mooncake up`` itself."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if str(run_dir) in words and "up" not in words:
                found.append(f"{entry.name}: {' '.join(words)}")
    return found


class Up:
    """A running ``mooncake up``."""

    def __init__(self, run_dir: Path, environment: dict[str, str], *arguments: str) -> None:
        self.run_dir = run_dir
        command = [sys.executable, "-m", "mooncake_plugins.cli", "up", "--run-dir", str(run_dir), *arguments]
        if environment.get("TEST_NOHUP"):
            command = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *command]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name="output of mooncake up")
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def expect(self, text: str) -> str:
        """Read lines until one contains the text."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            if line is None:
                raise AssertionError(f"ended without {text!r}:\n" + "\n".join(self.output))
            self.output.append(line)
            if text in line:
                return line

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for its end; the exit code. All output is in ``output`` then."""
        code = self.process.wait(timeout=PATIENCE_S)
        self._reader.join(timeout=PATIENCE_S)
        while (line := self._lines.get(timeout=PATIENCE_S)) is not None:
            self.output.append(line)
        self._lines.put(None)
        return code

    @property
    def text(self) -> str:
        return "\n".join(self.output)

    @property
    def deployment(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.run_dir / "deployment.json").read_text())
        return loaded

    def wait_until_nothing_is_left(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while left := processes_of(self.run_dir):
            if time.monotonic() > deadline:
                raise AssertionError(f"left behind: {left}")
            time.sleep(0.02)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has the toy plugin installed."""
    info = tmp_path / "site" / "launch_test_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: launch-test-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mooncake_plugins]\ntoy = launch_test_plugin\n")
    paths = (tmp_path / "site", PLUGIN, ROOT)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MOONCAKE_", "CUDA_"))}
    return kept | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "MOONCAKE_PLUGINS_DISABLED": "conductor,vllm",
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture
def up(tmp_path: Path, environment: dict[str, str]) -> Iterator[Any]:
    """Start ``mooncake up model --engine toy`` with more arguments; afterwards nothing may be left."""
    started: list[Up] = []

    def start(*arguments: str, **variables: str) -> Up:
        run_dir = tmp_path / f"run{len(started)}"
        base = ("org/model", "--engine", "toy", "--port", "0")
        started.append(Up(run_dir, environment | variables, *base, *arguments))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.end()
        assert one.process.stdout is not None
        one.process.stdout.close()
        one.wait_until_nothing_is_left()
