"""Each hook: a docstring, a section in docs/hooks.md, and that an offer through it arrives."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from mooncake_plugins.plugins import PluginRegistry, Provider, _hookspecs, hookimpl

HOOKS = PluginRegistry().hooks
SECTIONS = re.findall(
    r"^## `?(mooncake_\w+)`?$", (Path(__file__).parents[2] / "docs" / "hooks.md").read_text(), re.MULTILINE
)


def test_all_hook_specifications_are_registered() -> None:
    specified = [name for name, _ in inspect.getmembers(_hookspecs, inspect.isfunction) if name.startswith("mooncake_")]
    assert list(HOOKS) == specified


def test_each_hook_has_one_section_and_each_section_a_hook() -> None:
    assert sorted(SECTIONS) == list(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_has_a_docstring(hook: str) -> None:
    text = inspect.getdoc(getattr(_hookspecs, hook)) or ""
    assert text.startswith("Offer ")
    assert "The target is" in text


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_brings_an_offer_to_the_registry(hook: str) -> None:
    def offer() -> list[Provider]:
        return [Provider("mine", "package:attribute", help="a line")]

    offer.__name__ = hook
    registry = PluginRegistry()
    registry.register(type("Plugin", (), {hook: staticmethod(hookimpl(offer))})(), "third-party")
    registry.check_pending()
    assert registry.failures == ()
    assert registry.get(hook, "mine") == Provider("mine", "package:attribute", None, "a line", "third-party", hook)
