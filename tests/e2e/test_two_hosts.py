"""Prefill and decode on two hosts: network namespaces with their own addresses and their own /dev/shm.

Only TCP can connect them, and every byte of KV crosses the virtual link between them.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mooncake_plugins.launch import free_ports
from tests.e2e.client import complete, eventually, handoff_counts
from tests.e2e.processes import BIN, Process, engine_environment, vllm_argv, wait_until_ready
from tests.e2e.test_equality import BLOCK, BLOCK_BYTES, random_tokens

pytestmark = pytest.mark.netns

NET, PORT = "10.77.31", 18500
BRIDGE, HOSTS = f"mct{os.getpid() % 10000}", {"prefill": f"{NET}.2", "decode": f"{NET}.3"}


def ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], check=check, capture_output=True, text=True, timeout=20)
    return done.stdout


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, str]]:
    """Make two hosts on one bridge; yields the name of each one's namespace."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (Debian: apt-get install iproute2)")
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces")
    names = {role: f"{BRIDGE}-{role[0]}" for role in HOSTS}
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel or container allows no bridge: {error.stderr.strip()}")
    try:
        ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for role, name in names.items():
            ip("netns", "add", name)
            outside, inside = f"{BRIDGE}{role[0]}", "eth0"
            ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
            ip("link", "set", outside, "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{HOSTS[role]}/24", "dev", inside)
            ip("-n", name, "link", "set", inside, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names.values():
            ip("netns", "del", name, check=False)
        ip("link", "del", BRIDGE, check=False)


@pytest.fixture(scope="module")
def apart(hosts: dict[str, str], workdir: Path, model: Path, secret_file: Path) -> Iterator[str]:
    """Start one engine on each host and a Conductor outside; yields its URL."""
    processes = []
    try:
        for role, name in hosts.items():
            shell = 'mount -t tmpfs -o size=1g tmpfs /dev/shm && exec "$@"'
            prefix = ["ip", "netns", "exec", name, "unshare", "-m", "sh", "-c", shell, "sh"]
            argv = vllm_argv(model, PORT, "--kv-connector", "mooncake", "--kv-role", role, "--host", HOSTS[role])
            env = engine_environment(VLLM_HOST_IP=HOSTS[role], MOONCAKE_SECRET_FILE=str(secret_file))
            processes.append(Process(role, argv, workdir / f"host-{role}.log", env, prefix))
        wait_until_ready([(p, f"http://{HOSTS[p.name]}:{PORT}/health") for p in processes])
        (port,) = free_ports("127.0.0.1", 1)
        argv = [str(BIN / "mooncake"), "conductor", "--prefill", f"http://{HOSTS['prefill']}:{PORT}", "--decode",
                f"http://{HOSTS['decode']}:{PORT}", "--port", str(port), "--console-port", "0"]  # fmt: skip
        env = engine_environment(MOONCAKE_SECRET_FILE=str(secret_file))
        processes.append(Process("conductor", argv, workdir / "host-conductor.log", env))
        wait_until_ready([(processes[-1], f"http://127.0.0.1:{port}/health")])
        yield f"http://127.0.0.1:{port}"
    finally:
        for process in reversed(processes):
            process.stop()


def link_bytes() -> int:
    """Bytes that have come out of the prefill host."""
    return int(Path(f"/sys/class/net/{BRIDGE}p/statistics/rx_bytes").read_text())


@pytest.mark.parametrize("tokens", [33, 1500])
def test_kv_crosses_the_network(apart: str, expect: Any, tokens: int) -> None:
    decode = f"http://{HOSTS['decode']}:{PORT}"
    prompt = random_tokens(tokens, f"two hosts {tokens}")
    before, on_the_wire = handoff_counts(decode), link_bytes()
    assert complete(apart, prompt).token_ids == expect(prompt)
    eventually(lambda: handoff_counts(decode)["pulls_ok"] == before["pulls_ok"] + 1)
    counts = handoff_counts(decode) - before
    moved = math.ceil(tokens / BLOCK) * BLOCK_BYTES
    assert (counts["bytes_received"], counts["pulls_failed"], counts["pulls_by_tcp"]) == (moved, 0, 1)
    assert link_bytes() - on_the_wire >= moved
