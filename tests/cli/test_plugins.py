"""``mooncake plugins``: what is offered, what loads, and why something does not."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mooncake_plugins.cli import _plugins
from mooncake_plugins.plugins import PluginRegistry, Provider, default_registry
from tests.cli.offers import add, registry_with

OFFERS = [
    Provider("good", "tests.cli.offers:wave", help="loads"),
    Provider("absent", "no_such_library:x", extra="limbs", help="does not"),
    Provider("renamed", "tests.cli.offers:gone"),
]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> PluginRegistry:
    registry = registry_with(mooncake_transports=OFFERS)
    monkeypatch.setattr(_plugins, "default_registry", lambda: registry)
    return registry


def test_text(registry: PluginRegistry) -> None:
    result = CliRunner().invoke(_plugins.plugins)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert "  [ok] good         loads  (from test)" in lines
    assert "  [no] absent       does not  (from test)" in lines
    assert "       Python package 'no_such_library' is not installed; pip install 'mooncake-plugins[limbs]'" in lines
    assert any("has no attribute 'gone'" in line for line in lines)


def test_json(registry: PluginRegistry) -> None:
    found = json.loads(CliRunner().invoke(_plugins.plugins, ["--json"]).output)
    offers = {offer["name"]: offer for offer in found["offers"]}
    assert offers["good"]["loads"] is True
    assert offers["good"]["target"] == "tests.cli.offers:wave"
    assert offers["absent"]["remedy"] == "pip install 'mooncake-plugins[limbs]'"
    assert found["plugins"] == [{"name": "test", "distribution": "", "version": ""}]
    assert found["left_out"] == []


def test_duplicates_are_shown_not_raised(registry: PluginRegistry) -> None:
    add(registry, "other", mooncake_transports=[Provider("good", "tests.cli.offers:wave")])
    output = CliRunner().invoke(_plugins.plugins).output
    assert output.count("offered by other and test; disable one of them") == 2


def test_what_was_left_out_is_shown(registry: PluginRegistry) -> None:
    add(registry, "broken", mooncake_commands=["wool"])  # type: ignore[list-item]
    output = CliRunner().invoke(_plugins.plugins).output
    assert "left out:" in output
    assert "  broken: mooncake_commands raised PluginError" in output


def test_everything_of_this_project_loads_here() -> None:
    """In the development environment, which has all extras; a target that was moved is found here."""
    not_loading = [
        f"{offer['name']}: {offer['reason']}"
        for offer in _plugins.inventory(default_registry())["offers"]
        if not offer["loads"]
    ]
    assert not_loading == []
    assert default_registry().failures == ()
