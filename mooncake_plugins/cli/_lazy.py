"""A click group whose commands are imported when they are used, so that ``mooncake --help`` stays quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from mooncake_plugins.errors import PluginError
from mooncake_plugins.plugins import PluginRegistry, Provider

HOOK = "mooncake_commands"


class LazyGroup(click.Group):
    """The commands that are offered under some words.

    Args:
        registry: Gives the registry; called on first use.
        words: The words before the commands of this group; empty for ``mooncake`` itself.
    """

    def __init__(self, registry: Callable[[], PluginRegistry], words: tuple[str, ...] = (), **attributes: Any) -> None:
        super().__init__(**attributes)
        self._registry, self._words = registry, words

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The next word of everything that is offered here."""
        return sorted({words[len(self._words)] for words in self._offered()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or make the group that several commands join.

        Raises:
            PluginError: It is offered both as a command and as a group, or what is offered is no command.
            ProviderUnavailableError: It cannot be imported.
        """
        words = (*self._words, cmd_name)
        below = {other: provider for other, provider in self._offered().items() if other[: len(words)] == words}
        if not below:
            return None
        if words not in below:
            return LazyGroup(self._registry, words, name=cmd_name, help=f"Commands: {_names(below)}.")
        if len(below) > 1:
            raise PluginError(
                f"{' '.join(words)!r} is offered as a command and as a group: {_names(below)}; disable a plugin"
            )
        return _loaded(below[words])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with the help of their providers, importing none."""
        offered = self._offered()
        rows = [(name, self._line(name, offered)) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def _line(self, name: str, offered: dict[tuple[str, ...], Provider]) -> str:
        words = (*self._words, name)
        if words in offered:
            return offered[words].help
        return f"Commands: {_names({other: p for other, p in offered.items() if other[: len(words)] == words})}."

    def _offered(self) -> dict[tuple[str, ...], Provider]:
        offered = {tuple(name.split(" ")): provider for name, provider in self._registry().providers(HOOK).items()}
        depth = len(self._words)
        return {words: p for words, p in offered.items() if words[:depth] == self._words and len(words) > depth}


def _names(offered: dict[tuple[str, ...], Provider]) -> str:
    return ", ".join(sorted(" ".join(words) for words in offered))


def _loaded(provider: Provider) -> click.Command:
    command = provider.load()
    if not isinstance(command, click.Command):
        raise PluginError(f"{provider.target} of plugin {provider.plugin!r} is no click command")
    return command
