"""Finds plugins, asks them once what they offer, and keeps the answers.

One broken plugin never takes down the others: it is left out, and `PluginRegistry.failures` says why. A name that two
plugins offer is an error for whoever asks for that hook, because choosing silently would be worse.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import pluggy

from mooncake_plugins.config import from_sources
from mooncake_plugins.errors import DuplicateProviderError, PluginError, UnknownProviderError
from mooncake_plugins.plugins import _hookspecs
from mooncake_plugins.plugins._markers import PROJECT
from mooncake_plugins.plugins._provider import DISTRIBUTION, Provider

logger = logging.getLogger(__name__)

GROUP = "mooncake_plugins"

# Our own plugins, as pyproject.toml declares them (a test compares the two). Only used when the code runs from a
# checkout that is not installed, where no entry points exist. They are strings: the core imports nothing above it.
OWN_PLUGINS = {
    "core": "mooncake_plugins.plugins.builtin",
    "conductor": "mooncake_conductor.plugin",
    "vllm": "mooncake_vllm.plugin",
}


@dataclass(frozen=True, slots=True)
class PluginOptions:
    """Settings of the plugin core (section ``plugins``, environment ``MOONCAKE_PLUGINS_…``)."""

    disabled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A plugin that was loaded."""

    name: str
    distribution: str
    version: str


@dataclass(frozen=True, slots=True)
class PluginFailure:
    """A plugin that was left out, or whose answer to one hook was, and why."""

    name: str
    reason: str


class PluginRegistry:
    """Everything that is offered in this process.

    Thread-safety: `load` belongs to one thread; afterwards everything is read-only except the per-hook cache, which is
    safe to fill twice.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(_hookspecs)
        self._offers: dict[str, dict[str, list[Provider]]] = {}
        self._plugins: list[PluginInfo] = []
        self._failures: list[PluginFailure] = []

    @property
    def plugins(self) -> tuple[PluginInfo, ...]:
        """The plugins that were loaded, in order of name."""
        return tuple(sorted(self._plugins, key=lambda plugin: plugin.name))

    @property
    def failures(self) -> tuple[PluginFailure, ...]:
        """What was left out, and why. Filled by `load` and, for hooks that raise, by the first look at the hook."""
        return tuple(self._failures)

    @property
    def hooks(self) -> tuple[str, ...]:
        """The names of all hooks."""
        return tuple(sorted(name for name, hook in vars(self._manager.hook).items() if hook.has_spec()))

    def load(self, *, disabled: Iterable[str] = ()) -> None:
        """Load the plugins that are installed: our own and third parties'. Never raises because of a plugin.

        Args:
            disabled: Names of entry points to leave out.
        """
        left_out = frozenset(disabled)
        for entry_point in _entry_points():
            if entry_point.name not in left_out:
                self._load_one(entry_point)
        self.check_pending()

    def register(self, plugin: object, name: str, *, distribution: str = "", version: str = "") -> None:
        """Add a plugin object by hand (tests, embedding programs); call `check_pending` after the last one.

        Raises:
            PluginError: The name is taken, or a hook function has an argument that the hook does not have.
        """
        try:
            self._manager.register(plugin, name)
        except ValueError as error:
            raise PluginError(f"plugin {name!r}: {error}") from error
        except pluggy.PluginValidationError as error:
            if self._manager.is_registered(plugin):  # older pluggy keeps a plugin whose validation failed
                self._manager.unregister(plugin)
            raise PluginError(f"plugin {name!r}: {error}") from error
        self._plugins.append(PluginInfo(name, distribution, version))
        self._offers.clear()

    def check_pending(self) -> None:
        """Leave out plugins that implement a hook nobody specifies, usually a misspelt one; `failures` lists them."""
        while True:
            try:
                self._manager.check_pending()
            except pluggy.PluginValidationError as error:
                name = self._manager.get_name(error.plugin) or repr(error.plugin)
                self._manager.unregister(error.plugin)
                self._plugins = [plugin for plugin in self._plugins if plugin.name != name]
                self._fail(name, str(error))
            else:
                return

    def providers(self, hook: str) -> dict[str, Provider]:
        """What is offered through a hook, by name.

        Raises:
            UnknownProviderError: There is no such hook.
            DuplicateProviderError: Two plugins offer one name.
        """
        offers = self.offers(hook)
        for name, providers in offers.items():
            if len(providers) > 1:
                raise DuplicateProviderError(hook, name, tuple(provider.plugin for provider in providers))
        return {name: providers[0] for name, providers in offers.items()}

    def get(self, hook: str, name: str) -> Provider:
        """The provider of one name.

        Raises:
            UnknownProviderError: Nobody offers it; the known names are listed.
            DuplicateProviderError: Two plugins offer one name.
        """
        providers = self.providers(hook)
        if name not in providers:
            raise UnknownProviderError(hook, name, tuple(sorted(providers)))
        return providers[name]

    def offers(self, hook: str) -> dict[str, list[Provider]]:
        """As `providers`, with every offer of a name, so that duplicates can be shown."""
        if hook not in self.hooks:
            raise UnknownProviderError("hooks", hook, self.hooks)
        if hook not in self._offers:
            self._offers[hook] = self._collect(hook)
        return self._offers[hook]

    def _collect(self, hook: str) -> dict[str, list[Provider]]:
        found: dict[str, list[Provider]] = {}
        for name, plugin in sorted(self._manager.list_name_plugin()):
            for provider in self._ask(hook, name, plugin):
                found.setdefault(provider.name, []).append(replace(provider, plugin=name, hook=hook))
        return dict(sorted(found.items()))

    def _ask(self, hook: str, name: str, plugin: Any) -> list[Provider]:
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        try:
            answers = self._manager.subset_hook_caller(hook, others)()
            return [_checked(provider) for answer in answers for provider in answer]
        except Exception as error:  # noqa: BLE001 - a plugin's hook may raise anything; the others must go on
            self._fail(name, f"{hook} raised {type(error).__name__}: {error}")
            return []

    def _load_one(self, entry_point: metadata.EntryPoint) -> None:
        distribution = entry_point.dist
        try:
            plugin = entry_point.load()
            name, version = (distribution.name, distribution.version) if distribution else (DISTRIBUTION, "checkout")
            self.register(plugin, entry_point.name, distribution=name, version=version)
        except Exception as error:  # noqa: BLE001 - importing a plugin may raise anything; the others must go on
            self._fail(entry_point.name, f"{entry_point.value}: {type(error).__name__}: {error}")

    def _fail(self, name: str, reason: str) -> None:
        failure = PluginFailure(name, reason)
        if failure not in self._failures:
            self._failures.append(failure)
            logger.warning("plugin left out name=%s reason=%s", name, reason)


def _checked(provider: object) -> Provider:
    if not isinstance(provider, Provider):
        raise PluginError(f"a list of Provider is expected, got {type(provider).__name__}")
    return provider


def _entry_points() -> list[metadata.EntryPoint]:
    installed = list(metadata.entry_points(group=GROUP))
    ours = set(OWN_PLUGINS.items())
    if not any((point.name, point.value) in ours for point in installed):
        installed += [
            metadata.EntryPoint(name, module, GROUP) for name, module in OWN_PLUGINS.items() if _exists(module)
        ]
    return sorted(installed, key=lambda point: (point.name, point.value))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is absent
        return False


@functools.cache
def default_registry() -> PluginRegistry:
    """The registry of this process: installed plugins, minus those named in ``MOONCAKE_PLUGINS_DISABLED``. Loaded on
    first use.

    Raises:
        ConfigError: A ``MOONCAKE_PLUGINS_…`` variable is not usable.
    """
    registry = PluginRegistry()
    registry.load(disabled=from_sources(PluginOptions, "plugins", environ=os.environ).disabled)
    return registry
