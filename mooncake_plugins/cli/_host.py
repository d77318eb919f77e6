"""The doctor's checks of the host itself. Each answers one question and changes nothing."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from mooncake_plugins.config import format_bytes, load_secret
from mooncake_plugins.errors import ConfigError, ProviderUnavailableError
from mooncake_plugins.launch import visible_gpus
from mooncake_plugins.plugins import CheckResult, CheckStatus, PluginRegistry, default_registry

OK, INFO, WARN, FAIL = CheckStatus.OK, CheckStatus.INFO, CheckStatus.WARN, CheckStatus.FAIL
MIN_OPEN_FILES = 4096
MIN_FREE_MEMORY_BYTES = 4 << 30
INFINIBAND = Path("/sys/class/infiniband")


def check_host() -> Iterator[CheckResult]:
    """Python, memory, limits, devices, the secret, and whether what moves bytes can be loaded."""
    yield check_python(sys.version_info[:3], platform.system())
    yield check_memory(Path("/proc/meminfo"))
    yield check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield check_shared_memory(Path("/dev/shm"), shutil.disk_usage)
    yield check_gpus(visible_gpus(os.environ))
    yield check_rdma(INFINIBAND)
    yield check_secret(os.environ)
    yield from check_movers(default_registry())


def check_python(version: tuple[int, ...], system: str) -> CheckResult:
    """The interpreter and the operating system."""
    detail = f"Python {'.'.join(map(str, version))} on {system}"
    if system != "Linux":
        return CheckResult("platform", FAIL, detail, "only Linux is supported")
    if version < (3, 11):
        return CheckResult("platform", FAIL, detail, "install Python 3.11 or newer")
    return CheckResult("platform", OK, detail)


def check_memory(meminfo: Path) -> CheckResult:
    """Memory that is free for engines and their KVCache."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
        free, total = sizes["MemAvailable"], sizes["MemTotal"]
    except (OSError, KeyError, ValueError) as error:
        return CheckResult("memory", WARN, f"{meminfo} cannot be read ({error})")
    detail = f"{format_bytes(free)} of {format_bytes(total)} are free, {os.cpu_count()} CPUs"
    if free < MIN_FREE_MEMORY_BYTES:
        return CheckResult(
            "memory", WARN, detail, "an engine with a small model takes about 1.5 GiB; use fewer engines"
        )
    return CheckResult("memory", OK, detail)


def check_open_files(soft: int, hard: int) -> CheckResult:
    """The limit on open files: each connection takes one."""
    detail = f"{soft} (may be raised to {hard})"
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        return CheckResult("open files", WARN, detail, f"run: ulimit -n {MIN_OPEN_FILES}")
    return CheckResult("open files", OK, detail)


def check_shared_memory(folder: Path, usage: Callable[[Path], tuple[int, int, int]]) -> CheckResult:
    """Room in shared memory, which engines use between their processes."""
    try:
        total, _, free = usage(folder)
    except OSError as error:
        return CheckResult("shared memory", FAIL, f"{folder}: {error.strerror}", f"mount a tmpfs on {folder}")
    detail = f"{format_bytes(free)} of {format_bytes(total)} are free in {folder}"
    if total < 1 << 30:
        return CheckResult("shared memory", WARN, detail, "in a container, start it with --shm-size=1g or more")
    return CheckResult("shared memory", OK, detail)


def check_gpus(gpus: tuple[str, ...]) -> CheckResult:
    """GPUs, for `mooncake up` to share out."""
    if not gpus:
        return CheckResult("GPUs", INFO, "none; engines need a build for CPUs (README, Install)")
    return CheckResult("GPUs", OK, ", ".join(gpus))


def check_rdma(folder: Path) -> CheckResult:
    """RDMA devices that the kernel knows."""
    devices = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return CheckResult("RDMA", INFO, ", ".join(devices) or "no device; KV moves over TCP")


def check_secret(environ: Mapping[str, str]) -> CheckResult:
    """The cluster secret."""
    try:
        secret = load_secret(environ)
    except ConfigError as error:
        return CheckResult("secret", FAIL, str(error))
    if secret is None:
        return CheckResult(
            "secret", INFO, "MOONCAKE_SECRET_FILE is not set: only this host can connect (mooncake up makes one)"
        )
    return CheckResult("secret", OK, "MOONCAKE_SECRET_FILE can be used")


def check_movers(registry: PluginRegistry) -> Iterable[CheckResult]:
    """Whether transports and metadata backends can be loaded."""
    for hook, kind in (("mooncake_transports", "transport"), ("mooncake_metadata_backends", "metadata")):
        for name, provider in registry.providers(hook).items():
            try:
                provider.load()
            except ProviderUnavailableError as error:
                yield CheckResult(f"{kind} {name}", WARN, error.reason, error.remedy)
            else:
                yield CheckResult(f"{kind} {name}", OK, provider.help)
