"""``mooncake conductor``."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from mooncake_conductor.core import Role
from mooncake_conductor.proxy import ProxyOptions
from mooncake_conductor.worker import Addresses, ConductorConfig, run, serve
from mooncake_plugins.config import Secret, from_sources, load_secret
from mooncake_plugins.errors import MooncakeError
from mooncake_plugins.plugins import default_registry

F = TypeVar("F", bound=Callable[..., Any])
_OPTION_NAMES = {field.name for field in fields(ProxyOptions)}
_URLS: dict[str, Any] = {"metavar": "URL", "multiple": True}


def _seconds(name: str, text: str) -> Callable[[F], F]:
    return click.option(f"--{name}-timeout", f"{name.replace('-', '_')}_s", type=float, metavar="SECONDS", help=text)


class _ManyUrls(click.Command):
    """Lets several URLs follow one ``--prefill``, ``--decode``, ``--both`` or ``--coupled``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command`: repeats the option before each further URL."""
        roles = {f"--{role.value}" for role in Role}
        spread: list[str] = []
        last = ""
        for arg in args:
            if arg.startswith("-"):
                last = arg if arg in roles else ""
            elif last and spread[-1] != last:
                spread.append(last)
            spread.append(arg)
        return super().parse_args(ctx, spread)


@click.command(cls=_ManyUrls)
@click.option("--prefill", **_URLS, help="A prefill engine; repeat for more.")
@click.option("--decode", **_URLS, help="A decode engine; repeat for more.")
@click.option("--both", **_URLS, help="An engine that may serve either leg, or a request alone.")
@click.option("--coupled", **_URLS, help="An engine without our connector: serves whole requests, is never paired.")
@click.option("--engine", default="vllm", show_default=True, help="Kind of the engines.")
@click.option("--policy", default="least_loaded", show_default=True, help="How engines are chosen.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where clients connect.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--console-host", default="127.0.0.1", show_default=True, help="Elsewhere only with a key.")
@click.option(
    "--console-port",
    default=9464,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Metrics and state; 0: any free port.",
)
@click.option(
    "--console-key-file", type=Path, help="File with the key that the console asks for (mode 0600, 16 bytes or more)."
)
@click.option(
    "--engine-key-file", type=Path, help="File with the engines' API key; without it clients' own keys are passed on."
)
@click.option("--config", type=Path, help="TOML file; table [conductor].")
@click.option("--max-body-bytes", metavar="SIZE", help="Largest request body, for instance 64MiB.")
@click.option("--max-connections", type=int, help="Client connections at once.")
@click.option("--retries", type=int, help="Further attempts before the first byte.")
@_seconds("startup", "For all engines to answer at start.")
@_seconds("connect", "To connect with an engine.")
@_seconds("first-byte", "To the first byte of a streamed answer.")
@_seconds("between-bytes", "Between two pieces of an answer.")
@_seconds("total", "For a whole answer.")
@click.option("--ticket-lifetime", "ticket_s", type=float, metavar="SECONDS", help="Of a hand-off ticket.")
@click.option("--health-interval", "health_interval_s", type=float, metavar="SECONDS", help="Between health probes.")
@click.option("--grace", "grace_s", type=float, metavar="SECONDS", help="At stop, for requests in flight.")
@click.option("--address-file", type=Path, help="Write both URLs there, as JSON, once requests can be served.")
@click.option(
    "--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning", "error"])
)
def conductor(**given: Any) -> None:
    """Serve an OpenAI-compatible endpoint in front of prefill and decode engines.

    Several URLs may follow one --prefill, --decode, --both or --coupled. Every deadline and limit can also be set as
    MOONCAKE_CONDUCTOR_<NAME> or in a TOML file.
    """
    logging.getLogger("mooncake_conductor").setLevel(given["log_level"].upper())
    try:
        run(_main(make_config(given)))
    except MooncakeError as error:
        raise click.ClickException(str(error)) from error


def make_config(given: dict[str, Any]) -> ConductorConfig:
    """From command-line values to a checked configuration.

    Raises:
        ConfigError, PluginError: A value cannot be used.
    """
    registry = default_registry()
    options = {name: value for name, value in given.items() if name in _OPTION_NAMES}
    secret = load_secret(os.environ)
    return ConductorConfig(
        engines=tuple((role, url) for role in Role for url in given[role.value]),
        policy=registry.get("mooncake_scheduling_policies", given["policy"]).load()(),
        dialect=registry.get("mooncake_engine_dialects", given["engine"]).load()(),
        host=given["host"],
        port=given["port"],
        console_host=given["console_host"],
        console_port=given["console_port"],
        key=secret.key if secret else b"",
        engine_key=_key(given["engine_key_file"]),
        console_key=_key(given["console_key_file"]),
        address_file=given["address_file"],
        options=from_sources(ProxyOptions, "conductor", arguments=options, environ=os.environ, file=given["config"]),
    )


def _key(path: Path | None) -> bytes:
    return Secret.from_file(path).key if path else b""


async def _main(config: ConductorConfig) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def end() -> None:
        stop.set()
        for number in signals:  # a second one does not wait for requests in flight
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, end)
    await serve(config, stop, _say)


def _say(addresses: Addresses) -> None:
    click.echo(f"mooncake conductor: {addresses.url}/v1 (console {addresses.console})")
