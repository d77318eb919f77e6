"""What this package offers to ``mooncake`` itself (entry point group ``mooncake_plugins``)."""

from __future__ import annotations

from mooncake_plugins.plugins import Provider, hookimpl


@hookimpl
def mooncake_launch_profiles() -> list[Provider]:
    return [Provider("vllm", "mooncake_vllm._launch:VllmLaunchProfile", help="vLLM engines")]


@hookimpl
def mooncake_doctor_checks() -> list[Provider]:
    return [Provider("vllm", "mooncake_vllm._doctor:check_vllm", help="vLLM and its connector")]
