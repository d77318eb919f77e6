"""What the set-up scripts share: telling the user, locks, and long commands with signs of life."""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LOG_EVERY_S = 15.0


class SetupError(Exception):
    """Something that the user must do first, or a step that failed."""


def say(text: str) -> None:
    """Tell the user."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that dies with this process; say so if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that works on {path.with_suffix('')}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str], log: Path) -> None:
    """Run a command with its output in a log file, and show now and then that it lives.

    Raises:
        SetupError: It failed; the end of its output is part of the message.
    """
    began = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while (code := _wait(process)) is None:
                say(f"  {time.monotonic() - began:4.0f} s: {last_line(log)[:100]}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SetupError(f"this failed: {' '.join(command)}\n{tail}\n(all of it: {log})")


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(LOG_EVERY_S)
    except subprocess.TimeoutExpired:
        return None


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Pip:
    """Runs pip of one environment, with the host's own pip settings."""

    def __init__(self, python: Path, log: Path) -> None:
        self.python, self.log = python, log

    def __call__(self, *arguments: str) -> None:
        run([str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments], self.log)

    def install(self, arguments: Sequence[str]) -> None:
        """Install packages; without a progress bar, because the output goes to a log."""
        self("install", "--progress-bar=off", *arguments)

    def install_with_torch_index(self, requirements: Sequence[str]) -> None:
        """Install what the host's pip settings find; else look at PyTorch's own index of CPU builds too."""
        try:
            self.install(requirements)
        except SetupError:
            say(f"pip does not find {' '.join(requirements)} with this host's settings; trying {TORCH_CPU_INDEX}")
            self.install([*requirements, "--extra-index-url", TORCH_CPU_INDEX])
