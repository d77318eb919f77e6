"""``mooncake up`` with real processes: start, stop, death; the fixture checks that nothing is left afterwards."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from mooncake_plugins.launch import free_ports
from mooncake_plugins.launch._ports import _bound
from tests.launch.conftest import PATIENCE_S, processes_of


def test_starts_serves_and_stops(up: Any) -> None:
    run = up("--prefill", "2", "--decode", "1", "--", "--some-engine-flag")
    endpoint = run.expect("ready: http").split()[1]
    secret = run.run_dir / "secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(run.run_dir.stat().st_mode) == 0o700
    with urllib.request.urlopen(endpoint, timeout=PATIENCE_S) as answer:
        assert answer.status == 200
    parts = {part["name"]: part for part in run.deployment["parts"]}
    assert list(parts) == ["prefill-0", "prefill-1", "decode-0", "conductor"]
    assert f"{run.deployment['endpoint']}/v1" == endpoint
    ports = [part["url"].rpartition(":")[2] for part in parts.values()]
    assert (run.run_dir / "peers").read_text() == f"prefill:{ports[0]} prefill:{ports[1]} decode:{ports[2]}"
    log = Path(parts["decode-0"]["log"]).read_text()
    assert "role decode, gpus None" in log
    assert f"secret {secret}" in log
    run.send(signal.SIGINT)
    assert run.end() == 0
    run.wait_until_nothing_is_left()
    assert not secret.exists()
    assert "SIGINT: stopping everything" in run.text
    assert "died" not in run.text
    order = [line.split()[0] for line in run.output if "is starting" in line]
    assert order == ["prefill-0", "prefill-1", "decode-0", "conductor"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_ways_to_stop_it(up: Any, number: signal.Signals) -> None:
    run = up()
    run.expect("decode-0 is starting")
    run.send(number)
    assert run.end() == 0


def test_nohup_is_respected(up: Any) -> None:
    run = up(TEST_NOHUP="1")
    run.expect("ready: http")
    run.send(signal.SIGHUP)
    run.send(signal.SIGTERM)
    assert run.end() == 0
    assert "SIGTERM: stopping everything" in run.text
    assert "SIGHUP" not in run.text


def test_the_conductor_is_started_when_the_engines_are_ready(up: Any) -> None:
    run = up("--ready-timeout", "1", "--", "--in", "decode-0:unready")
    assert run.end() == 1
    assert "decode-0 was not ready within 1 s" in run.text
    assert "conductor is starting" not in run.text
    assert "says hello" in run.text


def test_a_part_that_dies_while_starting(up: Any) -> None:
    run = up("--", "--in", "decode-0:dies")
    assert run.end() == 1
    assert "decode-0 died: exit code 3" in run.text
    assert "  | toy engine: cannot find my model" in run.output
    assert "conductor is starting" not in run.text


@pytest.mark.parametrize(("behaviour", "how"), [("crashes", "killed by signal 11 (SIGSEGV)"), ("ends", "exit code 0")])
def test_a_part_that_dies_while_serving_stops_all(up: Any, behaviour: str, how: str) -> None:
    run = up("--", "--in", f"prefill-0:{behaviour}")
    run.expect("ready: http")
    (run.run_dir / "crash").touch()
    assert run.end() == 1
    assert f"prefill-0 died: {how}" in run.text
    run.wait_until_nothing_is_left()


def test_a_killed_part_is_told_from_others(up: Any) -> None:
    run = up()
    run.expect("ready: http")
    [group] = [part["process_group"] for part in run.deployment["parts"] if part["name"] == "decode-0"]
    os.killpg(group, signal.SIGKILL)  # its guard included
    assert run.end() == 1
    assert "decode-0 died: killed by signal 9 (SIGKILL)" in run.text


def test_a_program_that_does_not_exist(up: Any) -> None:
    run = up("--", "--no-program")
    assert run.end() == 1
    assert "decode-0 died: exit code 127" in run.text
    assert "/no/such/program: no such program" in run.text


def test_a_deaf_part_is_killed_after_the_grace(up: Any) -> None:
    run = up("--grace", "0.5", "--", "--in", "prefill-0:deaf")
    run.expect("ready: http")
    run.send(signal.SIGINT)
    assert run.end() == 0
    assert "prefill-0 did not stop within 0.5 s; killing it" in run.text
    run.wait_until_nothing_is_left()


def test_a_second_interrupt_kills(up: Any) -> None:
    run = up("--grace", "600", "--", "--in", "prefill-0:deaf")
    run.expect("ready: http")
    run.send(signal.SIGINT)
    run.expect("stopping everything")
    run.send(signal.SIGINT)
    assert run.end() == 0
    run.wait_until_nothing_is_left()


def test_a_process_that_left_its_session_is_found(up: Any) -> None:
    run = up("--grace", "0.5", "--", "--in", "prefill-0:orphan", "--in", "prefill-0:deaf")
    run.expect("ready: http")
    run.send(signal.SIGTERM)
    assert run.end() == 0
    run.wait_until_nothing_is_left()


def test_a_killed_supervisor_leaves_no_process(up: Any) -> None:
    run = up("--grace", "0.5", "--", "--in", "prefill-0:orphan", "--in", "decode-0:deaf")
    run.expect("ready: http")
    assert len(processes_of(run.run_dir)) == 3 * 4  # each part: its guard, itself and two below
    run.send(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    run.wait_until_nothing_is_left()


def test_a_stopped_supervisor_that_is_killed_leaves_no_process(up: Any) -> None:
    run = up("--grace", "0.5")
    run.expect("prefill-0 is starting")
    run.send(signal.SIGSTOP)
    run.send(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    run.wait_until_nothing_is_left()


def test_output_that_nobody_reads_any_more_stops_it(up: Any) -> None:
    run = up("--grace", "0.5", "--", "--in", "decode-0:crashes")
    run.expect("ready: http")
    reader = run.process.stdout
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), reader.fileno())  # closes our end of the pipe
    (run.run_dir / "crash").touch()
    assert run.process.wait(timeout=PATIENCE_S) == 1
    run.wait_until_nothing_is_left()


def test_each_engine_gets_its_gpus(up: Any) -> None:
    run = up("--prefill", "1", "--decode", "2", CUDA_VISIBLE_DEVICES="3,4,GPU-5,6,7,8,9")
    run.expect("ready: http")
    shares = [
        (run.run_dir / f"{name}.log").read_text().split("gpus ")[1].split()[0]
        for name in ("prefill-0", "decode-0", "decode-1")
    ]
    assert shares == ["3,4", "GPU-5,6", "7,8"]
    run.send(signal.SIGTERM)
    assert run.end() == 0


def test_a_secret_of_the_cluster_is_used_and_kept(up: Any, tmp_path: Path) -> None:
    secret = tmp_path / "cluster-secret"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    run = up(MOONCAKE_SECRET_FILE=str(secret))
    run.expect("ready: http")
    run.send(signal.SIGTERM)
    assert run.end() == 0
    assert f"secret {secret}" in (run.run_dir / "prefill-0.log").read_text()
    assert secret.exists()


class Refusal:
    """Runs ``mooncake up`` where it must refuse."""

    def __init__(self, environment: dict[str, str], run_dir: Path) -> None:
        self.environment, self.run_dir = environment, run_dir

    def __call__(self, *arguments: str, code: int = 2, **variables: str) -> str:
        command = [sys.executable, "-m", "mooncake_plugins.cli", "up", "--run-dir", str(self.run_dir), *arguments]
        began = time.monotonic()
        result = subprocess.run(
            command, env=self.environment | variables, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert result.returncode == code, result.stdout + result.stderr
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert time.monotonic() - began < PATIENCE_S
        return result.stderr


@pytest.fixture
def refused(environment: dict[str, str], tmp_path: Path) -> Refusal:
    return Refusal(environment, tmp_path / "run")


def test_refuses_an_unknown_engine(refused: Refusal) -> None:
    assert "--engine: 'abacus' is not usable; known engines: toy, uninstalled" in refused("m", "--engine", "abacus")
    assert "known engines: toy" in refused("m", "--engine", "conductor")


def test_refuses_an_engine_that_is_not_installed_or_too_old(refused: Refusal) -> None:
    assert "'no_such_engine' is not installed" in refused("m", "--engine", "uninstalled", code=1)
    assert "too old; install 0.2" in refused("m", "--engine", "toy", "--port", "0", "--", "--refuse", code=1)
    assert not refused.run_dir.exists()


@pytest.mark.parametrize("model", ["./missing", "/missing/model", "~/missing", "a/b/c", "white space", "-"])
def test_refuses_a_model_that_cannot_be_there(refused: Refusal, model: str) -> None:
    assert f"MODEL: {model!r} is not usable; there is no such folder" in refused(model, "--engine", "toy")


def test_refuses_a_folder_without_model(refused: Refusal, tmp_path: Path) -> None:
    assert "no config.json" in refused(str(tmp_path), "--engine", "toy")


def test_refuses_a_taken_port(refused: Refusal) -> None:
    [port] = free_ports("127.0.0.1", 1)
    with _bound("127.0.0.1", port) as sock:
        sock.listen()
        assert f"--port: {port} is not usable; another program" in refused("m", "--engine", "toy", "--port", str(port))


def test_refuses_a_foreign_address(refused: Refusal) -> None:
    assert "check --host" in refused("m", "--engine", "toy", "--host", "203.0.113.1")
    assert "check --host" in refused("m", "--engine", "toy", "--host", "no such host", "--port", "0")


def test_refuses_a_used_run_directory(refused: Refusal) -> None:
    refused.run_dir.mkdir()
    (refused.run_dir / "old.log").touch()
    assert "already holds files" in refused("m", "--engine", "toy", "--port", "0")
    (refused.run_dir / "old.log").unlink()
    refused.run_dir.rmdir()
    refused.run_dir.touch()
    assert "cannot be used as a folder" in refused("m", "--engine", "toy", "--port", "0")


def test_refuses_fewer_gpus_than_engines(refused: Refusal) -> None:
    text = refused("m", "--engine", "toy", "--port", "0", code=1, CUDA_VISIBLE_DEVICES="7")
    assert "2 engines need a GPU each, but only 1 is visible (7)" in text
    assert not refused.run_dir.exists()


def test_refuses_a_bad_secret(refused: Refusal, tmp_path: Path) -> None:
    text = refused("m", "--engine", "toy", "--port", "0", MOONCAKE_SECRET_FILE=str(tmp_path / "none"))
    assert "MOONCAKE_SECRET_FILE" in text
    assert not refused.run_dir.exists()


@pytest.mark.parametrize(
    "arguments",
    [["--prefill", "0"], ["--decode", "x"], ["--port", "65536"], ["--ready-timeout", "0"], ["--colour"], ["stray"]],
)
def test_refuses_wrong_use(refused: Refusal, arguments: list[str]) -> None:
    assert "(see: mooncake up --help)" in refused("m", *arguments)


def test_needs_a_model(refused: Refusal) -> None:
    assert "Missing argument 'MODEL'" in refused()
