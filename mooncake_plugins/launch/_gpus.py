"""Which GPUs this host offers, and how they are shared out: every engine gets its own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence

from mooncake_plugins.errors import LaunchError

_NVIDIA_SMI_TIMEOUT_S = 20.0


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; asks ``nvidia-smi`` if the variable is not
    set.

    Blocking: up to seconds, for ``nvidia-smi``; if that fails, there are none.
    """
    given = environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return parse_visible_devices(given)
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return ()
    command = [program, "--query-gpu=index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip().isdigit())


def parse_visible_devices(text: str) -> tuple[str, ...]:
    """Read ``CUDA_VISIBLE_DEVICES`` as CUDA does: the list ends at the first entry that is not a device, as -1."""
    devices: list[str] = []
    for entry in text.split(","):
        name = entry.strip()
        if not (name.isdigit() or name.startswith(("GPU-", "MIG-"))):
            break
        devices.append(name)
    return tuple(devices)


def split_gpus(gpus: Sequence[str], engines: int) -> list[tuple[str, ...] | None]:
    """Give each engine its own GPUs, neighbours together, the same number to each; what does not divide stays unused.

    Raises:
        LaunchError: There are GPUs, but fewer than engines.
    """
    if not gpus:
        return [None] * engines
    share = len(gpus) // engines
    if share == 0:
        seen = ", ".join(gpus)
        raise LaunchError(
            f"{engines} engines need a GPU each, but only {len(gpus)} is visible ({seen}); start fewer engines"
        )
    return [tuple(gpus[index * share : (index + 1) * share]) for index in range(engines)]
