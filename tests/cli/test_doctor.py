"""``mooncake doctor``: all findings are shown, and a broken check is one of them."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from click.testing import CliRunner

from mooncake_plugins.cli import _doctor, _host
from mooncake_plugins.plugins import CheckResult, CheckStatus, PluginRegistry, Provider
from tests.cli.offers import add, registry_with


def check(name: str) -> Provider:
    return Provider(name, f"tests.cli.offers:{name}_check")


def doctor(monkeypatch: pytest.MonkeyPatch, registry: PluginRegistry, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(_doctor, "default_registry", lambda: registry)
    result = CliRunner().invoke(_doctor.doctor, arguments, standalone_mode=False)
    assert result.exception is None
    code: int = result.return_value
    return code, result.output


def test_good_findings_end_well(monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = doctor(monkeypatch, registry_with(mooncake_doctor_checks=[check("good")]))
    assert code == 0
    assert output.splitlines() == ["[ ok ] hands: two", "[warn] feet: cold", "       wear socks"]


def test_a_failed_finding_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = doctor(monkeypatch, registry_with(mooncake_doctor_checks=[check("bad"), check("good")]), "--json")
    assert code == 1
    assert json.loads(output)[0] == {"name": "head", "status": "fail", "detail": "missing", "remedy": "look for it"}
    assert len(json.loads(output)) == 3


@pytest.mark.parametrize(
    ("name", "why"),
    [("broken", "OSError: no such limb"), ("wrong", "a CheckResult is expected, got str"), ("gone", "gone_check")],
)
def test_a_broken_check_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, name: str, why: str) -> None:
    code, output = doctor(monkeypatch, registry_with(mooncake_doctor_checks=[check(name), check("good")]))
    assert code == 1
    assert why in output
    assert "[ ok ] hands: two" in output


def test_plugins_that_were_left_out_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = add(registry_with(), "broken", mooncake_doctor_checks=["wool"])  # type: ignore[list-item]
    code, output = doctor(monkeypatch, registry)
    assert code == 0
    assert "[warn] plugin broken: left out" in output


def test_this_host_can_be_checked() -> None:
    results = list(_host.check_host())
    assert [result.name for result in results[:3]] == ["platform", "memory", "open files"]
    assert all(result.detail for result in results)
    assert {"transport tcp", "transport loopback", "metadata p2p"} <= {result.name for result in results}


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (_host.check_python((3, 12, 1), "Linux"), CheckStatus.OK),
        (_host.check_python((3, 10, 1), "Linux"), CheckStatus.FAIL),
        (_host.check_python((3, 12, 1), "Darwin"), CheckStatus.FAIL),
        (_host.check_memory(Path("/nonexistent")), CheckStatus.WARN),
        (_host.check_open_files(1024, 4096), CheckStatus.WARN),
        (_host.check_open_files(8192, 8192), CheckStatus.OK),
        (_host.check_open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY), CheckStatus.OK),
        (_host.check_shared_memory(Path("/"), lambda path: (64 << 20, 0, 64 << 20)), CheckStatus.WARN),
        (_host.check_shared_memory(Path("/"), lambda path: (8 << 30, 0, 8 << 30)), CheckStatus.OK),
        (_host.check_gpus(()), CheckStatus.INFO),
        (_host.check_gpus(("0", "1")), CheckStatus.OK),
        (_host.check_rdma(Path("/nonexistent")), CheckStatus.INFO),
        (_host.check_secret({}), CheckStatus.INFO),
        (_host.check_secret({"MOONCAKE_SECRET_FILE": "/nonexistent"}), CheckStatus.FAIL),
    ],
)
def test_single_checks(result: CheckResult, status: CheckStatus) -> None:
    assert result.status is status


def test_little_memory_is_told(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemAvailable:    1000000 kB\nHugePages_Total:  0\n")
    assert _host.check_memory(meminfo).status is CheckStatus.WARN
    meminfo.write_text("MemTotal:       16000000 kB\nMemAvailable:   15000000 kB\n")
    assert _host.check_memory(meminfo) == CheckResult("memory", CheckStatus.OK, _host.check_memory(meminfo).detail)


def test_absent_shared_memory_fails() -> None:
    def usage(folder: Path) -> tuple[int, int, int]:
        raise FileNotFoundError(2, "No such file or directory")

    assert _host.check_shared_memory(Path("/dev/shm"), usage).status is CheckStatus.FAIL


def test_rdma_devices_are_listed(tmp_path: Path) -> None:
    (tmp_path / "mlx5_0").mkdir()
    assert _host.check_rdma(tmp_path).detail == "mlx5_0"


def test_a_transport_that_does_not_load_is_told() -> None:
    registry = registry_with(mooncake_transports=[Provider("rdma", "no_such_verbs:Rdma", extra="rdma")])
    [result] = _host.check_movers(registry)
    assert (result.name, result.status) == ("transport rdma", CheckStatus.WARN)
    assert result.remedy == "pip install 'mooncake-plugins[rdma]'"
