"""A promise of something loadable: a name, where it is, and what it needs.

Nothing is imported until `Provider.load`, so a plugin whose library is absent does no harm to others and costs no
start-up time.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from mooncake_plugins.errors import PluginError, ProviderUnavailableError

_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
DISTRIBUTION = "mooncake-plugins"


@dataclass(frozen=True, slots=True)
class Provider:
    """One thing that a plugin offers.

    Args:
        name: What users write: a transport's scheme, a command's words (``"trace replay"``), an engine's name.
        target: ``"package.module:attribute"``, imported by `load`.
        extra: The extra of ``mooncake-plugins`` that brings the libraries it needs.
        help: One line for lists.
        plugin: Who offers it; filled in by the registry.
        hook: Through which hook; filled in by the registry.
    """

    name: str
    target: str
    extra: str | None = None
    help: str = ""
    plugin: str = ""
    hook: str = ""

    def __post_init__(self) -> None:
        if not self.name or self.name != " ".join(self.name.split()):
            raise PluginError(
                f"provider name {self.name!r} is not usable: words separated by single spaces are expected"
            )
        if not _TARGET.fullmatch(self.target):
            raise PluginError(
                f"provider {self.name!r}: target {self.target!r} is not of the form 'package.module:attribute'"
            )

    def load(self) -> Any:
        """Import the target and return it. Repeated calls return the same object.

        Raises:
            ProviderUnavailableError: The module or what it imports is absent, or it has no such attribute; the message
                says what to install.

        Blocking: for as long as the import takes. Thread-safe.
        """
        module_name, _, attribute = self.target.partition(":")
        try:
            value: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                value = getattr(value, part)
        except ImportError as error:
            raise ProviderUnavailableError(self.hook, self.name, _reason(error), self._remedy()) from error
        except Exception as error:
            remedy = f"{self.target} is wrong or broken; tell the authors of plugin {self.plugin or '(unknown)'!r}"
            reason = f"{type(error).__name__}: {error}"
            raise ProviderUnavailableError(self.hook, self.name, reason, remedy) from error
        return value

    def _remedy(self) -> str:
        if self.extra is not None:
            return f"pip install '{DISTRIBUTION}[{self.extra}]'"
        return "install what it needs" + (f" (plugin {self.plugin!r})" if self.plugin else "")


def _reason(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"Python package {error.name!r} is not installed"
    return str(error)
