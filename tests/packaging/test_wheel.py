"""The built wheel: what is in it, and that it works where there is no checkout."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import mooncake_plugins
from tests.packaging.conftest import ROOT, Installed, names_in

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_wheel_holds_the_five_packages_and_nothing_else(installed: Installed) -> None:
    tops = {name.split("/")[0] for name in names_in(installed.wheel)}
    packages = {Path(folder).name for folder in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert {top for top in tops if not top.endswith(".dist-info")} == packages
    assert len(packages) == 5


def test_every_package_says_that_it_is_typed(installed: Installed) -> None:
    names = names_in(installed.wheel)
    for folder in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert f"{Path(folder).name}/py.typed" in names


def test_the_licence_is_in_the_wheel(installed: Installed) -> None:
    assert any(name.endswith("licenses/LICENSE") for name in names_in(installed.wheel))


def test_it_works_without_the_checkout(installed: Installed) -> None:
    where = installed.python("-c", "import mooncake_plugins; print(mooncake_plugins.__file__)")
    assert where.startswith(str(installed.folder))
    assert installed.mooncake("--version") == f"mooncake {mooncake_plugins.__version__}\n"


def test_nothing_heavy_was_installed(installed: Installed) -> None:
    names = {package["name"] for package in json.loads(installed.python("-m", "pip", "list", "--format=json"))}
    required = {word.split(">")[0] for word in PROJECT["project"]["dependencies"]}
    assert names - {"pip", "setuptools"} == required | {"mooncake-plugins"}


def test_the_core_offers_its_parts_and_the_others_say_what_they_need(installed: Installed) -> None:
    found = json.loads(installed.mooncake("plugins", "--json"))
    assert found["left_out"] == []
    assert {plugin["name"] for plugin in found["plugins"]} == set(
        PROJECT["project"]["entry-points"]["mooncake_plugins"]
    )
    for offer in found["offers"]:
        assert offer["loads"] or "pip install 'mooncake-plugins[" in offer["remedy"], offer
    assert {"tcp", "loopback", "p2p", "up", "doctor"} <= {offer["name"] for offer in found["offers"] if offer["loads"]}


def test_doctor_works(installed: Installed) -> None:
    assert "[ ok ] transport tcp" in installed.mooncake("doctor")


def test_two_processes_move_bytes(installed: Installed, tmp_path: Path) -> None:
    program = shutil.copy(Path(__file__).with_name("move_bytes.py"), tmp_path)
    assert installed.python(str(program), "fetch", "tcp") == "equal tcp None\n"
