"""Ports, GPUs, run folders and the plan."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_plugins.config import Secret
from mooncake_plugins.errors import ConfigError, LaunchError
from mooncake_plugins.launch import (
    Deployment,
    RunDirectory,
    _ports,
    check_model,
    free_ports,
    plan,
    split_gpus,
    visible_gpus,
)
from mooncake_plugins.launch._gpus import parse_visible_devices
from mooncake_plugins.launch._ports import check_port_is_free
from mooncake_plugins.launch._shell import last_lines


def planned(tmp_path: Path, host: str = "127.0.0.1", port: int = 0) -> Deployment:
    folder = RunDirectory(tmp_path / "run")
    return plan(
        "org/model", prefill=2, decode=1, host=host, port=port, run_directory=folder, secret_file=folder.make_secret(),
        gpus=("0", "1", "2"), extra_args=("--x",),
    )  # fmt: skip


def test_plan(tmp_path: Path) -> None:
    deployment = planned(tmp_path)
    assert [(spec.name, spec.role, spec.gpus) for spec in deployment.engines] == [
        ("prefill-0", "prefill", ("0",)),
        ("prefill-1", "prefill", ("1",)),
        ("decode-0", "decode", ("2",)),
    ]
    assert deployment.conductor.peers == deployment.engines
    assert deployment.conductor.extra_args == ()
    assert len({spec.port for spec in (*deployment.engines, deployment.conductor)}) == 4
    assert {spec.log_path.parent for spec in deployment.engines} == {tmp_path / "run"}


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:8123"), ("::", "http://[::1]:8123"), ("10.0.0.1", "http://10.0.0.1:8123")],
)
def test_endpoint(tmp_path: Path, host: str, url: str) -> None:
    assert planned(tmp_path, host, 8123).endpoint == url


@given(st.integers(1, 9), st.integers(1, 9))
def test_no_gpu_is_given_twice_and_all_get_the_same(gpus: int, engines: int) -> None:
    names = [str(index) for index in range(gpus)]
    if gpus < engines:
        with pytest.raises(LaunchError, match="start fewer engines"):
            split_gpus(names, engines)
        return
    shares = [share for share in split_gpus(names, engines) if share is not None]
    given_out = [gpu for share in shares for gpu in share]
    assert given_out == names[: len(given_out)]
    assert {len(share) for share in shares} == {gpus // engines}
    assert len(shares) == engines


def test_without_gpus_nobody_gets_any() -> None:
    assert split_gpus([], 2) == [None, None]


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("", ()),
        ("-1", ()),
        ("0, 2", ("0", "2")),
        ("0,-1,2", ("0",)),
        ("GPU-1a,MIG-2b", ("GPU-1a", "MIG-2b")),
        ("x,1", ()),
    ],
)
def test_visible_devices(text: str, devices: tuple[str, ...]) -> None:
    assert parse_visible_devices(text) == devices
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": text, "PATH": ""}) == devices


@pytest.mark.parametrize(
    ("script", "devices"),
    [("echo 0; echo 1", ("0", "1")), ("echo 'No devices were found'", ()), ("exit 9", ())],
)
def test_nvidia_smi_is_asked(tmp_path: Path, script: str, devices: tuple[str, ...]) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    assert visible_gpus({"PATH": str(tmp_path)}) == devices
    assert visible_gpus({"PATH": "/nonexistent"}) == ()


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports("127.0.0.1", 20)
    assert len(set(ports)) == 20
    for port in ports:
        check_port_is_free("127.0.0.1", port)


def test_the_endpoint_port_is_not_given_to_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([7001, 7002, 7003])

    class Bound:
        def __init__(self, host: str, port: int) -> None:
            self.port = next(given)

        def __enter__(self) -> Bound:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def getsockname(self) -> tuple[str, int]:
            return "127.0.0.1", self.port

    monkeypatch.setattr(_ports, "_bound", Bound)
    assert free_ports("127.0.0.1", 2, avoid=7002) == [7001, 7003]


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(ConfigError, match="0 picks a free one"):
            check_port_is_free("127.0.0.1", sock.getsockname()[1])


def test_run_directory(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path / "a" / "run")
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    secret = folder.make_secret()
    assert Secret.from_file(secret)
    folder.describe({"parts": []})
    assert json.loads((folder.path / "deployment.json").read_text()) == {"parts": []}
    folder.close()
    folder.close()
    assert not secret.exists()
    assert folder.path.exists()


def test_an_unused_run_directory_leaves_no_trace(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path / "run")
    folder.make_secret()
    folder.close()
    assert not folder.path.exists()
    (tmp_path / "mine").mkdir()
    RunDirectory(tmp_path / "mine").close()
    assert (tmp_path / "mine").exists()


def test_default_run_directory() -> None:
    assert RunDirectory.default_path({"XDG_STATE_HOME": "/s"}).parent == Path("/s/mooncake/runs")
    assert RunDirectory.default_path({"HOME": "/h"}).parent == Path("/h/.local/state/mooncake/runs")


def test_models_that_pass(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    for model in (str(tmp_path), str(tmp_path / "config.json"), "meta-llama/Llama-3.1-8B", "gpt2"):
        assert check_model(model) == model


def test_a_model_at_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert check_model("~/model") == str(tmp_path / "model")


def test_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert last_lines(path, 3) == []
    path.write_bytes(b"x" * 100_000 + b"\n" + b"\xff\n" + b"".join(b"line %d\n" % index for index in range(5)))
    assert last_lines(path, 3) == ["line 2", "line 3", "line 4"]
    assert last_lines(path, 6)[0] == "�"
