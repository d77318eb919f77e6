"""The ``mooncake`` command: what it lists, what it imports, and how errors end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mooncake_plugins
from mooncake_plugins.cli import _main, main
from mooncake_plugins.errors import LaunchError
from mooncake_plugins.plugins import PluginRegistry, Provider
from tests.cli.offers import add, registry_with

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def registry() -> PluginRegistry:
    return registry_with(
        mooncake_commands=[
            Provider("wave", "tests.cli.offers:wave", help="Wave a hand."),
            Provider("dance slow", "tests.cli.offers:wave", help="Dance slowly."),
            Provider("dance fast", "tests.cli.offers:wave", help="Dance fast."),
            Provider("number", "tests.cli.offers:no_command", help="No command."),
            Provider("absent", "no_such_library:command", extra="limbs", help="Never loads."),
        ]
    )


@pytest.fixture
def run(registry: PluginRegistry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setattr(_main, "default_registry", lambda: registry)
    monkeypatch.delenv("MOONCAKE_DEBUG", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert isinstance(caught.value.code, int)
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"mooncake {mooncake_plugins.__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_all_commands_without_importing_any(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "Never loads." in out
    assert "dance   Commands: dance fast, dance slow." in out


def test_a_command_runs_and_its_result_is_the_exit_code(run: Run) -> None:
    assert run("wave") == (0, "waving the right hand\n", "")
    assert run("wave", "--hand", "left") == (3, "waving the left hand\n", "")


def test_commands_of_several_words_join_a_group(run: Run) -> None:
    assert run("dance", "slow") == (0, "waving the right hand\n", "")
    assert "Dance fast." in run("dance")[1] + run("dance", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("wave", "--hand", "none"), 1, "error: there is no hand to wave\n"),
        (("wave", "--hand", "third"), 2, "error: --hand: 'third' is not usable; use left or right\n"),
        (("wave", "--foot"), 2, "error: No such option '--foot'. (see: mooncake wave --help)\n"),
        (("jump",), 2, "error: No such command 'jump'. (see: mooncake --help)\n"),
        (("number",), 1, "error: tests.cli.offers:no_command of plugin 'test' is no click command\n"),
    ],
)
def test_errors_are_one_line(run: Run, arguments: tuple[str, ...], code: int, message: str) -> None:
    got = run(*arguments)
    assert got[:2] == (code, "")
    assert got[2].replace("option: ", "option ").replace("option --foot", "option '--foot'") == message


def test_an_absent_library_names_the_extra(run: Run) -> None:
    code, _, err = run("absent")
    assert code == 1
    assert err.endswith("pip install 'mooncake-plugins[limbs]'\n")


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_DEBUG", "1")
    with pytest.raises(LaunchError):
        main(["wave", "--hand", "none"])


def test_a_command_offered_twice_names_both_plugins(run: Run, registry: PluginRegistry) -> None:
    add(registry, "other", mooncake_commands=[Provider("wave", "tests.cli.offers:wave")])
    code, _, err = run("wave")
    assert code == 1
    assert "'wave' is offered by other and test; disable one of them" in err


def test_a_command_that_is_also_a_group_is_refused(run: Run, registry: PluginRegistry) -> None:
    add(registry, "other", mooncake_commands=[Provider("dance", "tests.cli.offers:wave")])
    code, _, err = run("dance")
    assert code == 1
    assert "'dance' is offered as a command and as a group: dance, dance fast, dance slow" in err


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from mooncake_plugins.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"numpy", "torch", "vllm", "asyncio", "multiprocessing", "uvloop", "aiohttp"} & set(sys.modules)
print("imported:", sorted(heavy), sorted(name for name in sys.modules if name.startswith("mooncake_plugins.transfer")))
"""
    result = fresh("-c", code)
    assert result.stdout.endswith("imported: [] []\n"), result.stdout + result.stderr


def test_the_module_is_the_command() -> None:
    result = fresh("-m", "mooncake_plugins.cli", "--version")
    assert result.stdout == f"mooncake {mooncake_plugins.__version__}\n"
    assert fresh("-m", "mooncake_plugins.cli", "nonsense").returncode == 2


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m mooncake_plugins.cli plugins | true"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.stderr == ""


def test_the_version_is_that_of_the_distribution() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mooncake_plugins.__version__
