"""A peer in a process of its own that can be stopped, resumed and killed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ._waiting import wait_until

ROOT = Path(__file__).parents[2]


class PeerProcess:
    """An engine in a child process. ``ask`` runs a command there, ``begin`` only sends it.

    Commands are the methods of ``Child`` in ``_peer_main.py``. Use as a context manager; leaving it kills the child,
    stopped or not.
    """

    def __init__(self, **options: Any) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mooncake_plugins.testing._peer_main", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        self._received = b""
        try:
            self.address: str = self.answer(timeout_s=60)["address"]
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def begin(self, command: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")

    def answer(self, timeout_s: float = 60) -> dict[str, Any]:
        """Return the answer of the oldest command that has none yet.

        Raises:
            AssertionError: The command failed, the child ended, or no answer came in time.
        """
        assert self._process.stdout is not None
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
            data = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            assert data, "the peer process gave no answer" if not ready else "the peer process ended"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        assert "ok" in answer, answer
        result: dict[str, Any] = answer["ok"]
        return result

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Run a command and return its answer."""
        self.begin(command, **arguments)
        return self.answer()

    def freeze(self) -> None:
        """Stop the child, as a debugger or a swapping host would."""
        os.kill(self.pid, signal.SIGSTOP)
        self.wait_frozen()

    def wait_frozen(self) -> None:
        """Wait until the child has stopped (by itself, after ``stop_after``)."""
        wait_until(lambda: _state(self.pid) == "T", "the peer process to stop")

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait(20)

    def close(self) -> None:
        """Kill it if it lives, and close the pipes."""
        if self._process.poll() is None:
            self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _state(pid: int) -> str:
    status = Path(f"/proc/{pid}/stat").read_text()
    return status.rpartition(")")[2].split()[0]
