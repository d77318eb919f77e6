"""The examples that need engines do what their READMEs say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mooncake_plugins.launch import free_ports
from tests.e2e.fleets import REPOSITORY
from tests.e2e.processes import BIN, engine_environment

EXAMPLES = REPOSITORY / "examples"
TIMEOUT_S = 300.0


def run_example(argv: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in its own process group; whatever happens, nothing of it is left."""
    log = folder / "example.log"
    env = engine_environment(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", TMPDIR=str(folder), **environment)
    with log.open("wb") as sink:
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        code = child.wait(TIMEOUT_S)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait(60)
    return subprocess.CompletedProcess(argv, code, log.read_text(errors="replace"), "")


def test_offline_llm(model: Path, tmp_path: Path) -> None:
    program = EXAMPLES / "offline_llm" / "offline_llm.py"
    result = run_example([sys.executable, str(program), str(model), "--prompts", "3"], tmp_path)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "All tokens are equal, and every prompt's KV came from the prefill engine." in result.stdout
    assert re.search(r"pulls_ok +3\n", result.stdout)
    assert re.search(r"pulls_failed +0\n", result.stdout)


def test_prefill_and_decode_by_hand(model: Path, tmp_path: Path) -> None:
    ports = free_ports("127.0.0.1", 4)
    names = ("PREFILL_PORT", "DECODE_PORT", "CONDUCTOR_PORT", "CONSOLE_PORT")
    variables = dict(zip(names, map(str, ports), strict=True))
    script = EXAMPLES / "prefill_decode_by_hand" / "run.sh"
    result = run_example(["bash", str(script), str(model)], tmp_path, **variables, ENGINE_ARGS="--dtype float32")
    logs = "".join(log.read_text(errors="replace")[-3000:] for log in tmp_path.glob("prefill-decode-*/*.log"))
    assert result.returncode == 0, result.stdout[-4000:] + logs
    assert '"object":"text_completion"' in result.stdout.replace(" ", "")
    assert "data: [DONE]" in result.stdout
    counted = dict(re.findall(r"^(\w+) (\d+)(?:\.0)?$", result.stdout, re.MULTILINE))
    assert counted["pulls_ok"] == "2", result.stdout
    assert "pulls_failed" not in counted or counted["pulls_failed"] == "0"
    for port in ports:
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run(["curl", "-s", f"http://127.0.0.1:{port}/health"], check=True, capture_output=True)
