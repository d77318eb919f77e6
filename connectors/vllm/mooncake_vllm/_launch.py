"""How ``mooncake up`` starts a vLLM engine."""

from __future__ import annotations

import os

from mooncake_plugins.errors import ConfigError, LaunchError
from mooncake_plugins.launch import Command, LaunchProfile, PartSpec
from mooncake_vllm._installed import INSTALL_HINT, OLDEST, InstalledVllm, find_vllm

_OURS = ("--kv-connector", "--kv-role", "--kv-transfer-config", "--host", "--port")
# On a CPU vLLM asks for nearly all memory unless told how much; two engines on one host would not start.
_CPU_CACHE_BYTES = 1 << 30


class VllmLaunchProfile(LaunchProfile):
    """Starts ``vllm serve MODEL --kv-connector mooncake --kv-role ...``."""

    name = "vllm"

    def check(self, spec: PartSpec) -> None:
        self._found()
        for argument in spec.extra_args:
            option = argument.split("=", 1)[0].replace("_", "-")
            if option in _OURS or option.startswith("--kv-transfer-config."):
                raise ConfigError("engine argument", argument, "mooncake up sets it; leave it out")

    def command(self, spec: PartSpec) -> Command:
        found = self._found()
        argv = [found.command or "vllm", "serve", spec.model, "--host", spec.host, "--port", str(spec.port)]
        argv += ["--kv-connector", "mooncake", "--kv-role", spec.role]
        env = {"VLLM_HOST_IP": os.environ.get("VLLM_HOST_IP", spec.host)}
        if found.is_cpu:
            argv += _cpu_arguments(spec.extra_args)
            env |= _cpu_environment()
        return Command((*argv, *spec.extra_args), env)

    def ready_url(self, spec: PartSpec) -> str:
        return f"http://{spec.host}:{spec.port}/health"

    def _found(self) -> InstalledVllm:
        found = find_vllm()
        if found is None or found.command is None:
            raise LaunchError(f"engine vllm is not installed here; {INSTALL_HINT}")
        if found.is_too_old:
            oldest = ".".join(map(str, OLDEST))
            raise LaunchError(f"engine vllm {found.version} is too old, {oldest} or newer is needed; {INSTALL_HINT}")
        return found


def _cpu_arguments(given: tuple[str, ...]) -> list[str]:
    sized = any(argument.replace("_", "-").startswith("--kv-cache-memory-bytes") for argument in given)
    return [] if sized or "VLLM_CPU_KVCACHE_SPACE" in os.environ else ["--kv-cache-memory-bytes", str(_CPU_CACHE_BYTES)]


def _cpu_environment() -> dict[str, str]:
    """Keep the engines of one host from binding their threads to the same cores."""
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    return {name: os.environ.get(name, value) for name, value in defaults.items()}
