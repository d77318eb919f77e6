"""Providers: nothing is imported before `load`, and every failure says what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mooncake_plugins.errors import PluginError, ProviderUnavailableError
from mooncake_plugins.plugins import Provider


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("provided_module", None)
    yield tmp_path / "provided_module.py"
    sys.modules.pop("provided_module", None)


def test_load_imports_and_returns_the_attribute(module: Path) -> None:
    module.write_text("class A:\n    class B:\n        pass\n")
    provider = Provider("b", "provided_module:A.B")
    assert "provided_module" not in sys.modules
    assert provider.load().__qualname__ == "A.B"
    assert provider.load() is provider.load()


def test_an_absent_library_names_the_extra() -> None:
    provider = Provider("etcd", "no_such_library.etcd:Etcd", extra="etcd", hook="mooncake_metadata_backends")
    with pytest.raises(ProviderUnavailableError) as caught:
        provider.load()
    assert str(caught.value) == (
        "mooncake_metadata_backends: 'etcd' cannot be loaded: Python package 'no_such_library' is not installed; "
        "pip install 'mooncake-plugins[etcd]'"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_an_absent_attribute_names_the_plugin(module: Path) -> None:
    module.write_text("")
    with pytest.raises(
        ProviderUnavailableError, match="provided_module:Gone is wrong or broken; tell the authors of plugin 'knitting'"
    ):
        Provider("gone", "provided_module:Gone", plugin="knitting").load()


def test_a_module_that_raises_is_an_error_of_ours(module: Path) -> None:
    module.write_text("raise OSError('no device')")
    with pytest.raises(ProviderUnavailableError, match="OSError: no device"):
        Provider("dev", "provided_module:Dev").load()


@pytest.mark.parametrize("name", ["", " up", "trace  replay", "a\n"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(PluginError, match="name"):
        Provider(name, "package:attribute")


@pytest.mark.parametrize("target", ["", "package", "package:", ":attribute", "package:attribute()", "a b:c"])
def test_bad_targets_are_refused(target: str) -> None:
    with pytest.raises(PluginError, match="package.module:attribute"):
        Provider("name", target)
