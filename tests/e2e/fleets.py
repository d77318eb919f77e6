"""Groups of engines for the end-to-end tests, and what can be done to them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mooncake_plugins.launch import free_ports
from tests.e2e.client import eventually, is_idle
from tests.e2e.processes import BIN, Process, engine_environment, vllm_argv, wait_until_ready

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def make_model(folder: Path, *more: str) -> Path:
    """Build a tiny random model, float32."""
    script = REPOSITORY / "examples" / "tiny_model" / "make_tiny_model.py"
    subprocess.run(
        [sys.executable, str(script), str(folder), *more], check=True, timeout=180, stdout=subprocess.DEVNULL
    )
    return folder


@dataclass
class Fleet:
    """Engines and a Conductor.

    Attributes:
        endpoint: The Conductor's URL.
        prefill, decode: The engines' URLs.
    """

    endpoint: str
    prefill: str
    decode: str
    processes: dict[str, Process]


class Faults:
    """Tells the decode engine's transport what to do; see ``faulty_transport``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def set(self, mode: str) -> None:
        for name in ("waiting", "go"):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / "mode").write_text(mode)

    def wait_at_gate(self) -> None:
        """Return once a read waits at the gate."""
        eventually((self.folder / "waiting").exists, what="no read came to the gate")

    def open_gate(self) -> None:
        (self.folder / "mode").write_text("pass")
        (self.folder / "go").touch()


def install_faulty_transport(folder: Path) -> Path:
    """Lay out the test's transport as an installed distribution; returns what to put on ``PYTHONPATH``."""
    info = folder / "mooncake_faulty-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mooncake-faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mooncake_plugins]\nfaulty = faulty_transport\n")
    shutil.copy(HERE / "faulty_transport.py", folder)
    return folder


class FaultyFleet:
    """A pair started by hand (both engines with role ``both``), whose parts can be killed and started again."""

    def __init__(self, workdir: Path, model: Path, secret_file: Path) -> None:
        self.workdir, self.model = workdir, model
        self.faults = Faults(workdir / "faults")
        self._plugins = install_faulty_transport(workdir / "faulty-transport")
        self._common = {
            "MOONCAKE_SECRET_FILE": str(secret_file),
            "MOONCAKE_HANDOFF_PEER_TIMEOUT_S": "4",
            "MOONCAKE_HANDOFF_LEASE_S": "12",
        }
        self._ports = dict(zip(("prefill", "decode", "conductor", "console"), free_ports("127.0.0.1", 4), strict=True))
        self.processes: dict[str, Process] = {}

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}"

    @property
    def endpoint(self) -> str:
        return self.url("conductor")

    def start_engines(self, *names: str, decode_options: dict[str, str] | None = None) -> None:
        for name in names:
            env = dict(self._common)
            if name == "decode":
                env |= {"PYTHONPATH": str(self._plugins), "MOONCAKE_TEST_FAULTS": str(self.faults.folder),
                        "MOONCAKE_HANDOFF_TRANSPORTS": "faulty", **(decode_options or {})}  # fmt: skip
            # Small caches can be filled; small steps make a prompt take many, so there is time to take its blocks.
            argv = vllm_argv(self.model, self._ports[name], "--kv-connector", "mooncake", "--kv-role", "both",
                             "--max-num-batched-tokens", "96", cache_bytes=32 << 20)  # fmt: skip
            self.processes[name] = Process(name, argv, self.workdir / f"faulty-{name}.log", engine_environment(**env))

    def wait_for_engines(self, *names: str) -> None:
        wait_until_ready([(self.processes[name], f"{self.url(name)}/health") for name in names])

    def start_conductor(self) -> None:
        env = engine_environment(**self._common)
        self.processes["conductor"] = self._conductor(
            "conductor", self._ports["conductor"], self._ports["console"], env
        )
        wait_until_ready([(self.processes["conductor"], f"{self.endpoint}/health")])

    @contextmanager
    def another_conductor(self, secret_file: Path) -> Iterator[str]:
        """Run a second Conductor with its own secret in front of the same engines; yields its URL."""
        port, console = free_ports("127.0.0.1", 2)
        env = engine_environment(**{**self._common, "MOONCAKE_SECRET_FILE": str(secret_file)})
        process = self._conductor("another-conductor", port, console, env)
        try:
            wait_until_ready([(process, f"http://127.0.0.1:{port}/health")])
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stop()

    def _conductor(self, name: str, port: int, console: int, env: dict[str, str]) -> Process:
        argv = [str(BIN / "mooncake"), "conductor", "--prefill", self.url("prefill"), "--decode", self.url("decode"),
                "--port", str(port), "--console-port", str(console), "--health-interval", "0.5"]  # fmt: skip
        return Process(name, argv, self.workdir / f"faulty-{name}.log", env)

    def wait_until_idle(self, *names: str, timeout_s: float = 40.0) -> None:
        """Wait until the engines run nothing and all their blocks are free again."""
        for name in names:
            eventually(partial(is_idle, self.url(name)), timeout_s=timeout_s, what=f"{name} is not idle")

    def stop(self) -> None:
        self.faults.open_gate()
        for process in reversed(self.processes.values()):
            process.stop()
