"""examples/third_party_transport: installed as a distribution of its own, found, and used."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from mooncake_plugins.errors import ConfigError
from mooncake_plugins.plugins import PluginRegistry
from mooncake_plugins.testing import TransportTests, leak_check
from tests.packaging.conftest import ROOT, Installed, build_wheel

__all__ = ["leak_check"]  # a fixture that the suite asks for

EXAMPLE = ROOT / "examples" / "third_party_transport"


@pytest.fixture(scope="module")
def with_throttle(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    wheel = build_wheel(EXAMPLE, tmp_path_factory.mktemp("throttle") / "wheel")
    installed.pip_install("--no-deps", str(wheel))
    yield installed
    installed.python("-m", "pip", "--quiet", "uninstall", "-y", "mooncake-throttle")


def test_it_is_found_and_loads(with_throttle: Installed) -> None:
    found = json.loads(with_throttle.mooncake("plugins", "--json"))
    assert {"name": "throttle", "distribution": "mooncake-throttle", "version": "1.0"} in found["plugins"]
    [offer] = [offer for offer in found["offers"] if offer["name"] == "throttle"]
    assert offer["loads"]


def test_two_processes_move_bytes_through_it(with_throttle: Installed, tmp_path: Path) -> None:
    program = shutil.copy(Path(__file__).with_name("move_bytes.py"), tmp_path)
    limit = {"MOONCAKE_THROTTLE_PER_SECOND_BYTES": "8MiB"}
    result, transport, pieces = with_throttle.python(str(program), "fetch", "throttle", **limit).split()
    assert (result, transport) == ("equal", "throttle")
    assert int(pieces) >= 10


def test_it_can_be_disabled(with_throttle: Installed) -> None:
    found = json.loads(with_throttle.mooncake("plugins", "--json", MOONCAKE_PLUGINS_DISABLED="throttle"))
    assert "throttle" not in {plugin["name"] for plugin in found["plugins"]}


@pytest.fixture
def example_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setenv("MOONCAKE_THROTTLE_PER_SECOND_BYTES", "4GiB")


@pytest.mark.usefixtures("example_on_path")
class TestThrottle(TransportTests):
    """The conformance suite, here in the checkout."""

    transport: ClassVar[str] = "throttle"

    def registry(self) -> PluginRegistry:
        """Our own plugins and the example."""
        import mooncake_throttle.plugin

        registry = PluginRegistry()
        registry.load()
        registry.register(mooncake_throttle.plugin, "throttle")
        return registry


def test_a_bad_limit_is_refused(example_on_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from mooncake_throttle.transport import ThrottleTransport

    monkeypatch.setenv("MOONCAKE_THROTTLE_PER_SECOND_BYTES", "fast")
    with pytest.raises(ConfigError, match="MOONCAKE_THROTTLE_PER_SECOND_BYTES"):
        ThrottleTransport()
    assert "mooncake_throttle" in sys.modules
