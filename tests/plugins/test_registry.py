"""The registry: what it finds, what it refuses, and that one bad plugin does no harm."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from mooncake_plugins.errors import DuplicateProviderError, PluginError, UnknownProviderError
from mooncake_plugins.plugins import PluginRegistry, Provider, _registry, default_registry, hookimpl

ROOT = Path(__file__).parents[2]


class Plugin:
    """A plugin object with the given hooks."""

    def __init__(self, **hooks: object) -> None:
        vars(self).update(hooks)


def offering(*providers: object) -> object:
    @hookimpl
    def mooncake_transports() -> list[object]:
        return list(providers)

    return Plugin(mooncake_transports=mooncake_transports)


def test_providers_know_their_plugin_and_hook() -> None:
    registry = PluginRegistry()
    registry.register(
        offering(Provider("wool", "yarn:Wool")), "knitting", distribution="mooncake-knitting", version="2"
    )
    provider = registry.get("mooncake_transports", "wool")
    assert (provider.plugin, provider.hook) == ("knitting", "mooncake_transports")
    assert registry.plugins[0].distribution == "mooncake-knitting"


def test_an_unknown_name_lists_the_known_ones() -> None:
    registry = PluginRegistry()
    registry.register(offering(Provider("wool", "yarn:Wool"), Provider("silk", "yarn:Silk")), "knitting")
    with pytest.raises(UnknownProviderError, match="nobody offers 'cotton'; known: silk, wool"):
        registry.get("mooncake_transports", "cotton")


def test_an_unknown_hook_lists_the_known_ones() -> None:
    with pytest.raises(UnknownProviderError, match="mooncake_transports"):
        PluginRegistry().providers("mooncake_transprots")


def test_a_duplicate_name_is_an_error_that_names_both_plugins() -> None:
    registry = PluginRegistry()
    registry.register(offering(Provider("wool", "yarn:Wool")), "one")
    registry.register(offering(Provider("wool", "sheep:Wool")), "two")
    with pytest.raises(DuplicateProviderError, match="'wool' is offered by one and two"):
        registry.providers("mooncake_transports")
    assert [provider.plugin for provider in registry.offers("mooncake_transports")["wool"]] == ["one", "two"]
    assert registry.providers("mooncake_commands") == {}


def test_a_hook_that_raises_leaves_out_only_its_plugin() -> None:
    @hookimpl
    def mooncake_transports() -> list[Provider]:
        raise RuntimeError("no sheep")

    registry = PluginRegistry()
    registry.register(Plugin(mooncake_transports=mooncake_transports), "broken")
    registry.register(offering(Provider("wool", "yarn:Wool")), "good")
    assert list(registry.providers("mooncake_transports")) == ["wool"]
    assert [failure.name for failure in registry.failures] == ["broken"]
    assert "no sheep" in registry.failures[0].reason


def test_an_offer_that_is_no_provider_is_refused() -> None:
    registry = PluginRegistry()
    registry.register(offering("wool"), "broken")
    assert registry.providers("mooncake_transports") == {}
    assert "a list of Provider is expected, got str" in registry.failures[0].reason


def test_a_misspelt_hook_is_found() -> None:
    @hookimpl
    def mooncake_transprots() -> list[Provider]:
        return []

    registry = PluginRegistry()
    registry.register(Plugin(mooncake_transprots=mooncake_transprots), "typo")
    registry.register(offering(Provider("wool", "yarn:Wool")), "good")
    registry.check_pending()
    assert [failure.name for failure in registry.failures] == ["typo"]
    assert "mooncake_transprots" in registry.failures[0].reason
    assert [plugin.name for plugin in registry.plugins] == ["good"]
    assert list(registry.providers("mooncake_transports")) == ["wool"]


def test_a_misspelt_hook_argument_is_refused_and_leaves_nothing() -> None:
    @hookimpl
    def mooncake_transports(size: int) -> list[Provider]:
        return []

    registry = PluginRegistry()
    with pytest.raises(PluginError, match="size"):
        registry.register(Plugin(mooncake_transports=mooncake_transports), "typo")
    assert registry.plugins == ()
    assert registry.providers("mooncake_transports") == {}


def test_registering_twice_is_refused_and_keeps_the_first() -> None:
    plugin = offering(Provider("wool", "yarn:Wool"))
    registry = PluginRegistry()
    registry.register(plugin, "knitting")
    with pytest.raises(PluginError, match="knitting"):
        registry.register(plugin, "knitting")
    assert list(registry.providers("mooncake_transports")) == ["wool"]


def entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> metadata.EntryPoint:
    (tmp_path / f"{name}_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    return metadata.EntryPoint(name, f"{name}_plugin", "mooncake_plugins")


def test_a_plugin_that_cannot_be_imported_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = entry_point(tmp_path, monkeypatch, "absent", "import no_such_library")
    crashing = entry_point(tmp_path, monkeypatch, "crashing", "raise SystemError('at import')")
    ours = metadata.EntryPoint("core", "mooncake_plugins.plugins.builtin", "mooncake_plugins")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [absent, crashing, ours])
    registry = PluginRegistry()
    registry.load()
    reasons = {failure.name: failure.reason for failure in registry.failures}
    assert "no_such_library" in reasons["absent"]
    assert "SystemError: at import" in reasons["crashing"]
    assert [plugin.name for plugin in registry.plugins] == ["core"]


def test_a_checkout_that_is_not_installed_offers_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    registry = PluginRegistry()
    registry.load()
    assert "core" in [plugin.name for plugin in registry.plugins]
    assert "tcp" in registry.providers("mooncake_transports")


def test_own_plugins_are_those_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["mooncake_plugins"] == _registry.OWN_PLUGINS


def test_a_disabled_plugin_is_not_loaded() -> None:
    registry = PluginRegistry()
    registry.load(disabled=["core"])
    assert "core" not in [plugin.name for plugin in registry.plugins]


def test_the_default_registry_is_loaded_once_and_obeys_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_PLUGINS_DISABLED", "core, other")
    default_registry.cache_clear()
    try:
        assert default_registry() is default_registry()
        assert "core" not in [plugin.name for plugin in default_registry().plugins]
    finally:
        default_registry.cache_clear()
