"""One fresh virtual environment outside the checkout, with the built wheel in it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 600.0


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Run a command as a user would, outside the checkout and without its Python path; its output."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    }
    result = subprocess.run(
        command,
        cwd=folder,
        env=kept | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}"
    return result.stdout


def build_wheel(source: Path, target: Path) -> Path:
    """Build a wheel with the build tools of this environment."""
    target.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    run([*pip, "--no-build-isolation", "--wheel-dir", str(target), str(source)], target)
    [wheel] = target.glob("*.whl")
    return wheel


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment with the wheel installed."""

    folder: Path
    wheel: Path

    def python(self, *arguments: str, **variables: str) -> str:
        """Run its interpreter."""
        return run([str(self.folder / "bin" / "python"), *arguments], self.folder, **variables)

    def mooncake(self, *arguments: str, **variables: str) -> str:
        """Run its ``mooncake``."""
        return run([str(self.folder / "bin" / "mooncake"), *arguments], self.folder, **variables)

    def pip_install(self, *arguments: str) -> None:
        """Install more."""
        self.python("-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, installed with what it requires and nothing else."""
    base = tmp_path_factory.mktemp("packaging")
    wheel = build_wheel(ROOT, base / "wheel")
    made = Installed(base / "venv", wheel)
    run([sys.executable, "-m", "venv", str(made.folder)], base)
    made.pip_install(str(wheel))
    return made


def names_in(wheel: Path) -> list[str]:
    """The files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()
