"""What a test plugin offers to the command line."""

from __future__ import annotations

from collections.abc import Iterator

import click

from mooncake_plugins.errors import ConfigError, LaunchError
from mooncake_plugins.plugins import CheckResult, CheckStatus, PluginRegistry, Provider, hookimpl

no_command = 42


@click.command("wave")
@click.option("--hand", default="right")
def wave(hand: str) -> int:
    """Wave a hand."""
    if hand == "none":
        raise LaunchError("there is no\nhand to wave")
    if hand == "third":
        raise ConfigError("--hand", hand, "use left or right")
    click.echo(f"waving the {hand} hand")
    return 3 if hand == "left" else 0


def good_check() -> Iterator[CheckResult]:
    """Two findings, none bad."""
    yield CheckResult("hands", CheckStatus.OK, "two")
    yield CheckResult("feet", CheckStatus.WARN, "cold", "wear socks")


def bad_check() -> Iterator[CheckResult]:
    """A finding that fails."""
    yield CheckResult("head", CheckStatus.FAIL, "missing", "look for it")


def broken_check() -> list[CheckResult]:
    """A check that does not work."""
    raise OSError("no such limb")


def wrong_check() -> list[str]:
    """A check that answers nonsense."""
    return ["fine"]


def registry_with(name: str = "test", **offers: list[Provider]) -> PluginRegistry:
    """A registry with one plugin that offers these providers, by hook."""
    return add(PluginRegistry(), name, **offers)


def add(registry: PluginRegistry, name: str, **offers: list[Provider]) -> PluginRegistry:
    """Register one more plugin."""

    def hook(providers: list[Provider]) -> object:
        return staticmethod(hookimpl(lambda: providers))

    registry.register(type(name, (), {hook_name: hook(providers) for hook_name, providers in offers.items()})(), name)
    return registry
