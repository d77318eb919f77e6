"""The plugin core: how this project's own parts and third parties offer what they have.

A plugin is a module (or object) with functions marked ``@hookimpl`` that return `Provider` objects; it is found through
the entry point group ``mooncake_plugins``. Our own parts take the same road. ``docs/hooks.md`` describes each hook.
"""

from __future__ import annotations

from mooncake_plugins.plugins._checks import CheckResult, CheckStatus
from mooncake_plugins.plugins._markers import hookimpl, hookspec
from mooncake_plugins.plugins._provider import Provider
from mooncake_plugins.plugins._registry import PluginFailure, PluginInfo, PluginRegistry, default_registry

__all__ = [
    "CheckResult",
    "CheckStatus",
    "PluginFailure",
    "PluginInfo",
    "PluginRegistry",
    "Provider",
    "default_registry",
    "hookimpl",
    "hookspec",
]
