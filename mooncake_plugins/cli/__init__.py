"""The ``mooncake`` command. Its sub-commands arrive through hook ``mooncake_commands``: nothing above is imported."""

from __future__ import annotations

from mooncake_plugins.cli._main import main

__all__ = ["main"]
