"""What the Conductor offers to the plugin system. Imports nothing heavy."""

from __future__ import annotations

from mooncake_plugins.plugins import Provider, hookimpl

_EXTRA = "conductor"


@hookimpl
def mooncake_commands() -> list[Provider]:
    """Offer ``mooncake conductor``."""
    text = "Serve an OpenAI-compatible endpoint in front of prefill and decode engines."
    return [Provider("conductor", "mooncake_conductor.cli:conductor", extra=_EXTRA, help=text)]


@hookimpl
def mooncake_engine_dialects() -> list[Provider]:
    """Offer the engines that the Conductor can talk to."""
    return [Provider("vllm", "mooncake_conductor.dialects:VllmDialect", help="vLLM's OpenAI server")]


@hookimpl
def mooncake_scheduling_policies() -> list[Provider]:
    """Offer the built-in policies."""
    return [
        Provider("least_loaded", "mooncake_conductor.core:LeastLoaded", help="fewest requests in flight"),
        Provider("round_robin", "mooncake_conductor.core:RoundRobin", help="each engine in turn"),
    ]


@hookimpl
def mooncake_launch_profiles() -> list[Provider]:
    """Offer the Conductor as a part of ``mooncake up``."""
    return [Provider("conductor", "mooncake_conductor.launch:ConductorProfile", help="the Conductor")]
