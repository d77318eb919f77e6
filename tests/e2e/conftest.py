"""Real engines for the end-to-end tests, each started once a session, in parallel where that is possible."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mooncake_plugins.launch import free_ports
from tests.e2e.client import complete
from tests.e2e.fleets import HERE, FaultyFleet, Fleet, make_model
from tests.e2e.processes import BIN, ENGINE_ARGUMENTS, Process, engine_environment, vllm_argv, wait_until_ready

SECRET = "end-to-end secret, at least sixteen bytes"


# Engines are started once and shared, so what ends them comes after all that needs them.
ORDER = (
    "test_equality",
    "test_bad_input",
    "test_preemption",
    "test_failures",
    "test_two_hosts",
    "test_examples",
    "test_up",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put these tests in order. All of them need vLLM; without it they are skipped and say so."""
    absent = importlib.util.find_spec("vllm") is None
    items.sort(key=lambda item: ORDER.index(item.path.stem) + 1 if item.path.parent == HERE else 0)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if absent:
                item.add_marker(
                    pytest.mark.skip(reason="vLLM is not installed in this environment; `make test` has one")
                )


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of all engines of the session; kept by pytest for the last three sessions."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def model(workdir: Path) -> Path:
    return make_model(workdir / "tiny")


@pytest.fixture(scope="session")
def secret_file(workdir: Path) -> Path:
    path = workdir / "secret"
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


# --- the single engine everything is compared with -------------------------------------------------


@pytest.fixture(scope="session")
def engines(workdir: Path, model: Path) -> Iterator[tuple[str, Fleet]]:
    """Start, together, the reference engine (no connector) and ``mooncake up`` with a prefill and a decode engine."""
    port, endpoint_port = free_ports("127.0.0.1", 2)
    reference = Process("reference", vllm_argv(model, port), workdir / "reference.log", engine_environment())
    run_dir = workdir / "up"
    argv = [str(BIN / "mooncake"), "up", str(model), "--port", str(endpoint_port), "--run-dir", str(run_dir), "--",
            *ENGINE_ARGUMENTS, "--kv-cache-memory-bytes", str(64 << 20)]  # fmt: skip
    deployment = Process("mooncake-up", argv, workdir / "up.log", engine_environment())
    try:
        endpoint = f"http://127.0.0.1:{endpoint_port}"
        wait_until_ready([(reference, f"http://127.0.0.1:{port}/health"), (deployment, f"{endpoint}/health")])
        parts = {p["name"]: p["url"] for p in json.loads((run_dir / "deployment.json").read_text())["parts"]}
        fleet = Fleet(endpoint, parts["prefill-0"], parts["decode-0"], {"up": deployment})
        yield f"http://127.0.0.1:{port}", fleet
    finally:
        deployment.stop()
        reference.stop()


@pytest.fixture(scope="session")
def reference(engines: tuple[str, Fleet]) -> str:
    """URL of a single vLLM engine without any connector."""
    return engines[0]


@pytest.fixture(scope="session")
def pair(engines: tuple[str, Fleet]) -> Fleet:
    """One prefill and one decode engine behind a Conductor, as ``mooncake up`` starts them."""
    return engines[1]


@pytest.fixture(scope="session")
def faulty(workdir: Path, model: Path, secret_file: Path) -> Iterator[FaultyFleet]:
    fleet = FaultyFleet(workdir, model, secret_file)
    try:
        fleet.start_engines("prefill", "decode")
        fleet.wait_for_engines("prefill", "decode")
        fleet.start_conductor()
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def expect(reference: str) -> object:
    """Return a function that asks the single engine for the right tokens."""
    return lambda prompt, **more: complete(reference, prompt, **more).token_ids


os.environ.setdefault("no_proxy", "127.0.0.1")
