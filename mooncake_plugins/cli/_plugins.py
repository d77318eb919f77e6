"""``mooncake plugins``."""

from __future__ import annotations

import json
from typing import Any

import click

from mooncake_plugins.errors import PluginError, ProviderUnavailableError
from mooncake_plugins.plugins import PluginRegistry, Provider, default_registry


@click.command("plugins")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(as_json: bool) -> None:
    """List what is offered, what loads, and why something does not."""
    found = inventory(default_registry())
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


def inventory(registry: PluginRegistry) -> dict[str, Any]:
    """Everything that the registry knows, with the result of loading each provider."""
    offers = [
        _tried(hook, provider, providers)
        for hook in registry.hooks
        for providers in registry.offers(hook).values()
        for provider in providers
    ]
    return {
        "plugins": [
            {"name": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
            for plugin in registry.plugins
        ],
        "offers": offers,
        "left_out": [{"name": failure.name, "reason": failure.reason} for failure in registry.failures],
    }


def _tried(hook: str, provider: Provider, offers: list[Provider]) -> dict[str, Any]:
    reason = remedy = ""
    if len(offers) > 1:
        reason, remedy = f"offered by {' and '.join(offer.plugin for offer in offers)}", "disable one of them"
    else:
        try:
            provider.load()
        except ProviderUnavailableError as error:
            reason, remedy = error.reason, error.remedy
        except PluginError as error:
            reason = str(error)
    return {
        "hook": hook,
        "name": provider.name,
        "plugin": provider.plugin,
        "target": provider.target,
        "help": provider.help,
        "loads": not reason,
        "reason": reason,
        "remedy": remedy,
    }


def _lines(found: dict[str, Any]) -> list[str]:
    lines = ["plugins:"]
    lines += [f"  {plugin['name']}  ({plugin['distribution']} {plugin['version']})" for plugin in found["plugins"]]
    for hook in sorted({offer["hook"] for offer in found["offers"]}):
        lines += ["", f"{hook.removeprefix('mooncake_').replace('_', ' ')}:"]
        lines += [line for offer in found["offers"] if offer["hook"] == hook for line in _offer_lines(offer)]
    if found["left_out"]:
        lines += ["", "left out:"]
        lines += [f"  {failure['name']}: {failure['reason']}" for failure in found["left_out"]]
    return lines


def _offer_lines(offer: dict[str, Any]) -> list[str]:
    state = "ok" if offer["loads"] else "no"
    lines = [f"  [{state}] {offer['name']:<12} {offer['help']}  (from {offer['plugin']})"]
    if not offer["loads"]:
        lines.append(f"       {offer['reason']}; {offer['remedy']}".rstrip("; "))
    return lines
