"""What CI runs, with other programs in place of make."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def ci(tmp_path: Path, make: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    shutil.copy(ROOT / "scripts" / "find_python.sh", tmp_path / "scripts")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("make", make), ("ip", "exit 0")):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o700)
    variables = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    command = [str(tmp_path / ".ci" / "run")]
    return subprocess.run(command, cwd="/", env=variables, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("make", "last", "code"),
    [
        ("echo made $1; echo '7 passed, 0 failed'", "14 passed, 0 failed", 0),
        ("echo '5 passed, 2 failed'; exit 2", "10 passed, 4 failed", 1),
        ("echo Segmentation fault; exit 139", "0 passed, 2 failed", 1),
        ("[[ $1 == test ]] || exit 1; echo '3 passed, 0 failed'", "3 passed, 1 failed", 1),
    ],
)
def test_the_last_line_is_the_sum_and_the_exit_code_follows(tmp_path: Path, make: str, last: str, code: int) -> None:
    result = ci(tmp_path, make)
    assert result.stdout.splitlines()[-1] == last
    assert result.returncode == code


def test_it_says_how_long_each_took_and_reads_no_input(tmp_path: Path) -> None:
    lines = ci(
        tmp_path, "read -r line && exit 1; [[ $CI == true ]] || exit 1; echo '1 passed, 0 failed'"
    ).stdout.splitlines()
    assert lines[-1] == "2 passed, 0 failed"
    assert [line for line in lines if line.startswith("make ")] == ["make test: 0 s", "make check: 0 s"]
