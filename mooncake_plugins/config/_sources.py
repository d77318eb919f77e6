"""Fill a frozen dataclass from arguments, the environment and a file, and say exactly which of them was wrong.

The dataclass is the schema: its fields are the only keys, its defaults the only defaults, its types the only
conversions, and its ``__post_init__`` the only checks. Fields whose name ends in ``_bytes`` accept ``64MiB``; tuples
accept comma-separated text.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mooncake_plugins.config._sizes import parse_bytes
from mooncake_plugins.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """A raw value and what to call it in an error."""

    value: Any
    origin: str
    is_text: bool


def from_sources(
    cls: type[T],
    section: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> T:
    """Make a ``cls`` from an argument > ``MOONCAKE_<SECTION>_<FIELD>`` > ``field`` in table ``[section]`` of the TOML
    file > its default.

    Args:
        cls: A dataclass; its fields are the known keys.
        section: One lower-case word; sections of one file belong to different parts, so others are not looked at.
        arguments: By field name; None as a value means "not given".
        environ: Usually ``os.environ``; variables that begin with ``MOONCAKE_<SECTION>_`` and name no field are errors.
        file: The TOML file, if one was named; then it must exist.

    Raises:
        ConfigError: An unknown key, a value of the wrong type, a missing field without default, or an unreadable file.
    """
    if not section.isalnum() or section != section.lower():
        raise ConfigError(
            "section", section, "use one lower-case word, so that MOONCAKE_<SECTION>_<FIELD> can be told apart"
        )
    types = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    found: dict[str, _Found] = {}
    for name, item in _candidates(section, arguments or {}, environ or {}, file):
        if name not in fields:
            raise ConfigError(item.origin, item.value, f"it is not known; known: {', '.join(sorted(fields)) or 'none'}")
        found.setdefault(name, item)
    for name, field in fields.items():
        if name not in found and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            remedy = f"it has no default; set MOONCAKE_{section.upper()}_{name.upper()}"
            raise ConfigError(f"{section}.{name}", None, remedy)
    return cls(**{name: _convert(item, name, types[name]) for name, item in found.items()})


def _candidates(
    section: str, arguments: Mapping[str, Any], environ: Mapping[str, str], file: Path | None
) -> Iterator[tuple[str, _Found]]:
    """All given values, strongest source first."""
    for name, value in arguments.items():
        if value is not None:
            yield name, _Found(value, f"{section}.{name}", is_text=isinstance(value, str))
    prefix = f"MOONCAKE_{section.upper()}_"
    for variable, text in environ.items():
        if variable.startswith(prefix):
            yield variable.removeprefix(prefix).lower(), _Found(text, variable, is_text=True)
    if file is not None:
        for name, value in _read_section(file, section).items():
            yield name, _Found(value, f"{section}.{name} in {file}", is_text=False)


def _read_section(file: Path, section: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("config file", str(file), f"it cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("config file", str(file), f"it is not TOML: {error}") from error
    table = document.get(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{section} in {file}", table, f"make it a table: [{section}]")
    return table


def _convert(found: _Found, name: str, kind: Any) -> Any:
    value = found.value
    if name.endswith("_bytes") and isinstance(value, str):
        return parse_bytes(value, field=found.origin)
    if found.is_text and typing.get_origin(kind) is tuple:
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        return msgspec.convert(value, kind, strict=not found.is_text, dec_hook=_convert_other)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        raise ConfigError(found.origin, found.value, _remedy(error)) from error


def _convert_other(kind: Any, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"expected {getattr(kind, '__name__', kind)}")


def _remedy(error: Exception) -> str:
    text = str(error)
    return text[:1].lower() + text[1:]
