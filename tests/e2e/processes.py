"""Engines and routers as child processes: own process group, own log, ended by group."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 300.0

# float32 makes greedy tokens comparable; a small batch of tokens makes prompts take several chunks.
ENGINE_ARGUMENTS = (
    "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
    "--max-num-seqs", "8", "--block-size", "32", "--max-num-batched-tokens", "256",
)  # fmt: skip


def engine_environment(**more: str) -> dict[str, str]:
    """Return the environment for an engine: no hub, one thread, loopback."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


class Process:
    """A child with its own process group and log file."""

    def __init__(
        self, name: str, argv: Sequence[str], log: Path, env: Mapping[str, str], prefix: Sequence[str] = ()
    ) -> None:
        self.name, self.log = name, log
        with log.open("ab") as sink:
            self._child = subprocess.Popen(
                [*prefix, *argv], stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=dict(env),
                start_new_session=True, cwd=log.parent,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def is_running(self) -> bool:
        return self._child.poll() is None

    def signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        return self._child.wait(timeout_s)

    def stop(self, grace_s: float = 20.0) -> None:
        """End the whole group, politely first."""
        self.signal_group(signal.SIGCONT)
        self.signal_group(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(grace_s)
        self.signal_group(signal.SIGKILL)
        self._child.wait(10.0)

    def kill(self) -> None:
        self.signal_group(signal.SIGKILL)
        self._child.wait(10.0)

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def wait_until_ready(processes: Sequence[tuple[Process, str]], timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until every URL answers 200; a dead process fails at once, with the end of its log."""
    deadline = time.monotonic() + timeout_s
    for process, url in processes:
        while not answers(url):
            if not process.is_running:
                raise AssertionError(f"{process.name} ended during start:\n{process.tail()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{process.name} was not ready within {timeout_s} s:\n{process.tail()}")
            time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def vllm_argv(model: Path, port: int, *more: str, cache_bytes: int = 64 << 20) -> list[str]:
    """Return the stock command line of an engine, with whatever else comes last."""
    return [
        str(BIN / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *ENGINE_ARGUMENTS,
        "--kv-cache-memory-bytes", str(cache_bytes), *more,
    ]  # fmt: skip
