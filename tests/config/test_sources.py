"""Settings from arguments, environment and file."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from mooncake_plugins.config import from_sources
from mooncake_plugins.errors import ConfigError


class Mode(Enum):
    OFF = "off"
    SHADOW = "shadow"


@dataclass(frozen=True, slots=True)
class Options:
    """Every kind of field."""

    slice_bytes: int = 65536
    workers: int = 2
    ratio: float = 0.5
    is_verified: bool = True
    name: str = ""
    folder: Path | None = None
    hosts: tuple[str, ...] = ()
    mode: Mode = Mode.OFF
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError("workers", self.workers, "use 1 or more")


@dataclass(frozen=True, slots=True)
class Required:
    """A field without default."""

    model: str


def options(**sources: Any) -> Options:
    return from_sources(Options, "transfer", **sources)


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mooncake.toml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    assert options() == Options()


def test_argument_wins_over_environment_wins_over_file(tmp_path: Path) -> None:
    file = toml(tmp_path, "[transfer]\nworkers = 3\nratio = 0.25\nname = 'file'\n[other]\nx = 1\n")
    environ = {"MOONCAKE_TRANSFER_WORKERS": "4", "MOONCAKE_TRANSFER_NAME": "env", "MOONCAKE_OTHER_X": "1", "HOME": "/"}
    got = options(arguments={"workers": 5, "ratio": None}, environ=environ, file=file)
    assert got == Options(workers=5, ratio=0.25, name="env")


def test_text_is_converted() -> None:
    environ = {
        "MOONCAKE_TRANSFER_SLICE_BYTES": "64MiB",
        "MOONCAKE_TRANSFER_RATIO": "1e-3",
        "MOONCAKE_TRANSFER_IS_VERIFIED": "false",
        "MOONCAKE_TRANSFER_FOLDER": "/var/run",
        "MOONCAKE_TRANSFER_HOSTS": "a, b,",
        "MOONCAKE_TRANSFER_MODE": "shadow",
    }
    wanted = Options(64 << 20, 2, 0.001, False, "", Path("/var/run"), ("a", "b"), Mode.SHADOW)
    assert options(environ=environ) == wanted


def test_file_values_keep_their_types(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        "[transfer]\nslice_bytes = '1MiB'\nhosts = ['a', 'b']\nis_verified = false\nfolder = 'x'\ntags = {a = 'b'}\n",
    )
    assert options(file=file) == Options(
        1 << 20, hosts=("a", "b"), is_verified=False, folder=Path("x"), tags={"a": "b"}
    )


def test_arguments_may_already_have_the_right_type() -> None:
    assert options(arguments={"folder": Path("x"), "mode": Mode.SHADOW, "hosts": ("a",)}).folder == Path("x")


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("WORKERS", "two", "expected `int`"),
        ("WORKERS", "1.5", "expected `int`"),
        ("IS_VERIFIED", "maybe", "expected `bool`"),
        ("MODE", "loud", "invalid enum value"),
        ("SLICE_BYTES", "64 quarts", "KiB is 1024"),
        ("SLICE_BITES", "1", "it is not known; known: folder, hosts"),
    ],
)
def test_a_bad_variable_is_named_with_its_value(variable: str, value: str, why: str) -> None:
    name = f"MOONCAKE_TRANSFER_{variable}"
    with pytest.raises(ConfigError, match=why) as caught:
        options(environ={name: value})
    assert (caught.value.field, caught.value.value) == (name, value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[transfer]\nworkers = 'two'\n", "expected `int`"),
        ("[transfer]\nworkers = '2'\n", "expected `int`"),
        ("[transfer]\nunknown = 1\n", "not known"),
        ("transfer = 3\n", "make it a table"),
        ("[transfer\n", "not TOML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, why: str) -> None:
    file = toml(tmp_path, text)
    with pytest.raises(ConfigError, match=why) as caught:
        options(file=file)
    assert str(file) in str(caught.value)


def test_an_absent_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        options(file=tmp_path / "absent.toml")


def test_an_unknown_argument_is_an_error() -> None:
    with pytest.raises(ConfigError, match="transfer.colour"):
        options(arguments={"colour": "red"})


def test_a_required_field_says_how_to_set_it() -> None:
    with pytest.raises(
        ConfigError, match="serve.model: None is not usable; it has no default; set MOONCAKE_SERVE_MODEL"
    ):
        from_sources(Required, "serve")


def test_the_class_checks_itself() -> None:
    with pytest.raises(ConfigError, match="use 1 or more"):
        options(arguments={"workers": 0})


@pytest.mark.parametrize("section", ["two_words", "Upper", "", "a b"])
def test_a_section_is_one_lower_case_word(section: str) -> None:
    with pytest.raises(ConfigError, match="one lower-case word"):
        from_sources(Options, section)
