"""The scripts that make environments and run suites, without installing anything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import _overlay
import _steps
import environments
import pytest
import run_suites

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return environments.cache_folder()


SMALL = environments.Definition("small", ("nothing",), needed_bytes=0)


def test_the_key_is_what_defines_it() -> None:
    assert SMALL.key == replace(SMALL).key
    keys = {
        SMALL.key,
        replace(SMALL, requirements=("x",)).key,
        replace(SMALL, removed=("y",)).key,
        replace(SMALL, has_shim=True).key,
    }
    assert len(keys) == 4


def test_the_definitions_carry_what_the_project_needs() -> None:
    made = environments.definitions()
    assert not [r for r in made["dev"].requirements if r.startswith(("vllm", "torch"))]
    assert environments.VLLM in made["vllm"].requirements
    assert any(r.startswith("pytest") for r in made["vllm"].requirements)
    assert made["vllm"].first == (environments.TORCH,)


def test_an_interrupted_build_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def build(definition: environments.Definition, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "half").touch()
        built.append(folder)
        if len(built) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(environments, "build", build)
    with pytest.raises(KeyboardInterrupt):
        environments.cached(SMALL)
    folder = environments.cached(SMALL)
    assert environments.cached(SMALL) == folder
    assert len(built) == 2
    assert folder.parent == cache


def test_too_little_room_is_told_first(cache: Path) -> None:
    with pytest.raises(_steps.SetupError, match="are free; set XDG_CACHE_HOME"):
        environments.cached(replace(SMALL, needed_bytes=1 << 60))


def test_prune_removes_only_what_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "definitions", lambda: {"small": SMALL})
    for name in (f"small-{SMALL.key}", "small-0000", "unfinished"):
        (cache / name).mkdir(parents=True)
        if name != "unfinished":
            (cache / name / environments.COMPLETE).touch()
    environments.prune()
    assert sorted(path.name for path in cache.iterdir()) == sorted([f"small-{SMALL.key}", "unfinished"])


def test_the_torch_index_is_a_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], log: Path) -> None:
        calls.append(command)
        if len(calls) == 1:
            raise _steps.SetupError("not found")

    monkeypatch.setattr(_steps, "run", run)
    _steps.Pip(Path("python"), tmp_path / "log").install_with_torch_index(["torch==1"])
    assert _steps.TORCH_CPU_INDEX not in calls[0]
    assert calls[1][-2:] == ["--extra-index-url", _steps.TORCH_CPU_INDEX]


def test_a_failed_step_shows_the_end_of_its_output(tmp_path: Path) -> None:
    code = "print('first'); print('no room'); raise SystemExit(3)"
    with pytest.raises(_steps.SetupError, match="no room"):
        _steps.run([sys.executable, "-c", code], tmp_path / "log")


def test_a_long_step_shows_that_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_steps, "LOG_EVERY_S", 0.05)
    go = tmp_path / "go"
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        go.touch()

    monkeypatch.setattr(_steps, "say", say)
    code = f"import os, time\nprint('working', flush=True)\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)"
    _steps.run([sys.executable, "-c", code], tmp_path / "log")
    assert " s: " in said[0]


def test_scripts_run_with_the_interpreter_of_their_environment(tmp_path: Path) -> None:
    path = tmp_path / "with space"
    path.mkdir()
    point = metadata.EntryPoint("where", "json.tool:main", "console_scripts")
    _overlay.write_script(path / "where", point)
    answer = subprocess.run([str(path / "where"), "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "usage" in answer.stdout


def test_an_environment_is_current_only_for_what_it_was_made_for(tmp_path: Path) -> None:
    stamp = tmp_path / "stamp"
    assert not _overlay.is_current(stamp, {"a": "b"})
    stamp.write_text('{"a": "b"}')
    assert _overlay.is_current(stamp, {"a": "b"})
    assert not _overlay.is_current(stamp, {"a": "c"})
    stamp.write_text('{"a":')
    assert not _overlay.is_current(stamp, {"a": "b"})


def test_reports_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    assert run_suites.read_report(path) == (0, 0, 0)
    path.write_text('<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3"/></testsuites>')
    assert run_suites.read_report(path) == (3, 3, 3)
    path.write_text("<testsuites><testsu")
    assert run_suites.read_report(path) == (0, 0, 0)


def test_the_last_line_is_the_sum(capsys: pytest.CaptureFixture[str]) -> None:
    results = [run_suites.Result("a", 5, 0, 1, 2.0), run_suites.Result("b", 7, 2, 0, 1.0)]
    assert run_suites.report(results) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "12 passed, 2 failed"
    assert run_suites.report(results[:1]) == 0


def test_every_test_is_in_one_suite() -> None:
    suites = run_suites.SUITES
    assert set(run_suites.TRANSFER) <= set(suites["transfer"].arguments)
    for path in (*run_suites.TRANSFER, *run_suites.PACKAGING):
        assert f"--ignore={path}" in suites["unit"].arguments
        assert (path in suites["transfer"].arguments) != (path in suites["packaging"].arguments)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["test", "nonsense"]])
def test_wrong_use_is_told(arguments: list[str]) -> None:
    assert run_suites.main(arguments) == 2


def test_an_old_python_is_refused_with_what_to_install(tmp_path: Path) -> None:
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o700)
    sh = shutil.which("sh")
    assert sh is not None
    command = [sh, str(ROOT / "scripts" / "find_python.sh")]
    answer = subprocess.run(
        command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=60
    )
    assert answer.returncode == 1
    assert "apt-get install python3" in answer.stderr


def test_the_python_of_choice_is_taken() -> None:
    command = ["sh", str(ROOT / "scripts" / "find_python.sh")]
    answer = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == sys.executable
