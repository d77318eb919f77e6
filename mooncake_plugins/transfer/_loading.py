"""Finds transports and metadata backends by name."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mooncake_plugins.errors import ConfigError, ProviderUnavailableError, UnknownProviderError
from mooncake_plugins.metadata import MetadataBackend
from mooncake_plugins.transports import Transport

if TYPE_CHECKING:
    from mooncake_plugins.plugins import PluginRegistry

log = logging.getLogger(__name__)

TRANSPORT_HOOK = "mooncake_transports"
METADATA_HOOK = "mooncake_metadata_backends"


def registry_or_default(registry: PluginRegistry | None) -> PluginRegistry:
    """The given registry, or that of this process."""
    if registry is not None:
        return registry
    from mooncake_plugins.plugins import default_registry  # not needed by those who pass their own

    return default_registry()


def load_transports(registry: PluginRegistry, names: tuple[str, ...] | None) -> dict[str, Transport]:
    """Make the named transports; with None, every one that is offered and can be loaded.

    Raises:
        ConfigError: A name is unknown or given twice.
        ProviderUnavailableError: A named transport lacks what it needs.
    """
    if names is None:
        return _load_all(registry)
    if not names or len(set(names)) != len(names):
        raise ConfigError("transports", names, "name at least one transport, and each once")
    loaded: dict[str, Transport] = {}
    for name in names:
        try:
            loaded[name] = _checked(name, registry.get(TRANSPORT_HOOK, name).load()())
        except UnknownProviderError as error:
            raise ConfigError("transports", name, f"known transports: {', '.join(error.known)}") from error
    return loaded


def _load_all(registry: PluginRegistry) -> dict[str, Transport]:
    loaded: dict[str, Transport] = {}
    for name, provider in registry.providers(TRANSPORT_HOOK).items():
        try:
            loaded[name] = _checked(name, provider.load()())
        except ProviderUnavailableError as error:
            log.info("transport left out name=%s reason=%s", name, error.reason)
    return loaded


def _checked(name: str, transport: object) -> Transport:
    if not isinstance(transport, Transport):
        raise ConfigError("transports", name, f"{type(transport).__name__} does not implement Transport")
    if transport.name != name:
        raise ConfigError(
            "transports", name, f"the transport calls itself {transport.name!r}; its author must fix that"
        )
    return transport


def load_metadata(registry: PluginRegistry, setting: str) -> tuple[type[MetadataBackend], str]:
    """Return the backend's class and location of a setting ``name`` or ``name://location``."""
    name, _, location = setting.partition("://")
    try:
        backend = registry.get(METADATA_HOOK, name).load()
    except UnknownProviderError as error:
        raise ConfigError("metadata", setting, f"known backends: {', '.join(error.known)}") from error
    if not (isinstance(backend, type) and issubclass(backend, MetadataBackend)):
        raise ConfigError("metadata", setting, f"{backend!r} does not implement MetadataBackend")
    return backend, location
