"""The command line, the plugin's offers, the launch profile, and life without the optional libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mooncake_conductor import cli
from mooncake_conductor.core import LeastLoaded, Role, RoundRobin, SchedulingPolicy
from mooncake_conductor.dialects import EngineDialect, VllmDialect
from mooncake_conductor.launch import ConductorProfile
from mooncake_conductor.proxy import ProxyOptions
from mooncake_conductor.worker import ConductorConfig

from mooncake_plugins.errors import ConfigError, LaunchError, UnknownProviderError
from mooncake_plugins.launch import PartSpec
from mooncake_plugins.plugins import default_registry


def configure(*arguments: str) -> ConductorConfig:
    context = cli.conductor.make_context("conductor", list(arguments))
    return cli.make_config(context.params)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MOONCAKE_")]:
        monkeypatch.delenv(name)


def test_several_urls_may_follow_one_option() -> None:
    config = configure(
        "--prefill", "http://a:1", "http://b:1", "--decode=http://c:1", "--decode", "http://d:1", "--port", "9"
    )
    assert [(role, url[7]) for role, url in config.engines] == [
        (Role.PREFILL, "a"),
        (Role.PREFILL, "b"),
        (Role.DECODE, "c"),
        (Role.DECODE, "d"),
    ]
    assert config.port == 9 and isinstance(config.policy, LeastLoaded) and isinstance(config.dialect, VllmDialect)


def test_a_stray_argument_is_refused() -> None:
    import click

    with pytest.raises(click.UsageError, match="unexpected extra argument"):
        configure("--port", "9", "http://a:1")


def test_settings_come_from_arguments_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mooncake.toml"
    file.write_text("[conductor]\ntotal_s = 1.5\nretries = 7\nconnect_s = 3\n")
    monkeypatch.setenv("MOONCAKE_CONDUCTOR_RETRIES", "8")
    monkeypatch.setenv("MOONCAKE_CONDUCTOR_CONNECT_S", "4")
    arguments = ["--config", str(file), "--connect-timeout", "5", "--max-body-bytes", "1MiB", "--policy", "round_robin"]
    config = configure("--both", "http://a:1", *arguments)
    options = config.options
    assert (options.total_s, options.retries, options.connect_s, options.max_body_bytes) == (1.5, 8, 5.0, 1 << 20)
    assert isinstance(config.policy, RoundRobin)
    monkeypatch.setenv("MOONCAKE_CONDUCTOR_RETRYS", "8")
    with pytest.raises(ConfigError, match="RETRYS"):
        configure("--both", "http://a:1")


@pytest.mark.parametrize("name", sorted(ProxyOptions.__dataclass_fields__))
def test_each_setting_refuses_nonsense(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ProxyOptions(**{name: -1})


def test_secret_and_keys_come_from_private_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o600)
    monkeypatch.setenv("MOONCAKE_SECRET_FILE", str(file))
    config = configure("--both", "http://a:1", "--console-key-file", str(file), "--engine-key-file", str(file))
    assert config.key == config.console_key == config.engine_key == b"0123456789abcdef"
    file.chmod(0o644)
    with pytest.raises(ConfigError):
        configure("--both", "http://a:1")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownProviderError, match=r"least_loaded.*round_robin"):
        configure("--both", "http://a:1", "--policy", "best")
    with pytest.raises(UnknownProviderError, match="vllm"):
        configure("--both", "http://a:1", "--engine", "tgi")


def test_what_the_plugin_offers_loads() -> None:
    registry = default_registry()
    for hook, kind in (("mooncake_scheduling_policies", SchedulingPolicy), ("mooncake_engine_dialects", EngineDialect)):
        for name, provider in registry.providers(hook).items():
            offered: Any = provider.load()
            assert issubclass(offered, kind) and (offered.name == name or provider.plugin != "conductor")
    assert registry.get("mooncake_commands", "conductor").load() is cli.conductor
    assert registry.get("mooncake_launch_profiles", "conductor").load() is ConductorProfile


def part(name: str, role: str, port: int, host: str = "127.0.0.1", **more: Any) -> PartSpec:
    return PartSpec(name, role, "model", host, port, Path("/log"), Path("/run"), Path("/secret"), **more)


def test_the_launch_profile_starts_the_command() -> None:
    engines = (part("prefill-0", "prefill", 1), part("decode-0", "decode", 2), part("both-0", "both", 3, "0.0.0.0"))
    spec = part("conductor", "conductor", 8000, "0.0.0.0", peers=engines)
    profile = ConductorProfile()
    profile.check(spec)
    command = profile.command(spec)
    assert command.argv[:4] == (sys.executable, "-m", "mooncake_plugins.cli", "conductor")
    config = configure(*command.argv[4:])
    assert config.engines == (
        (Role.PREFILL, "http://127.0.0.1:1"),
        (Role.DECODE, "http://127.0.0.1:2"),
        (Role.BOTH, "http://127.0.0.1:3"),
    )
    assert (config.host, config.port, config.console_port) == ("0.0.0.0", 8000, 0)
    assert config.address_file == Path("/run/conductor.json")
    assert profile.ready_url(spec) == "http://127.0.0.1:8000/health"
    with pytest.raises(LaunchError, match="no engine"):
        profile.check(part("conductor", "conductor", 8000))


def test_without_the_extra_everything_imports_and_says_what_to_install() -> None:
    program = """
import importlib, pkgutil, sys
for name in ("uvloop", "httptools", "prometheus_client"):
    sys.modules[name] = None
import mooncake_conductor
for module in pkgutil.walk_packages(mooncake_conductor.__path__, "mooncake_conductor."):
    importlib.import_module(module.name)
from mooncake_conductor.cli import conductor
conductor(["--both", "http://a:1"])
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "PATH": os.environ.get("PATH", "")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert "pip install 'mooncake-plugins[conductor]'" in result.stderr and "Traceback" not in result.stderr
