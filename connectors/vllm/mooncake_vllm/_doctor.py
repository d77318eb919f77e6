"""What ``mooncake doctor`` says about vLLM."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator

from mooncake_plugins.plugins import CheckResult, CheckStatus
from mooncake_vllm._installed import INSTALL_HINT, OLDEST, find_vllm


def check_vllm() -> Iterator[CheckResult]:
    """Yield whether vLLM is here, whether its version is known to work, and whether it will load this plugin."""
    found = find_vllm()
    if found is None:
        yield CheckResult("vllm", CheckStatus.INFO, "not installed", INSTALL_HINT)
        return
    build = "CPU build" if found.is_cpu else "GPU build"
    if found.is_too_old:
        oldest = ".".join(map(str, OLDEST))
        yield CheckResult(
            "vllm", CheckStatus.FAIL, f"{found.version} ({build}) is too old", f"upgrade to {oldest} or newer"
        )
        return
    yield CheckResult("vllm", CheckStatus.OK, f"{found.version} ({build})")
    yield _entry_point()


def _entry_point() -> CheckResult:
    names = {entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if "mooncake" not in names:
        remedy = "install mooncake-plugins into vLLM's environment (pip install mooncake-plugins)"
        return CheckResult("vllm plugin", CheckStatus.FAIL, "vLLM will not find the connector", remedy)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "mooncake" not in allowed.split(","):
        return CheckResult(
            "vllm plugin", CheckStatus.FAIL, f"VLLM_PLUGINS={allowed} leaves it out", "add mooncake to it, or unset it"
        )
    return CheckResult(
        "vllm plugin", CheckStatus.OK, "vLLM loads the connector: vllm serve MODEL --kv-connector mooncake"
    )
