"""Byte sizes as people write them: ``64MiB``, ``1.5 GB``, ``4096``."""

from __future__ import annotations

import re
from decimal import Decimal

from mooncake_plugins.errors import ConfigError

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", 1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)
_REMEDY = "write a whole number of bytes, as 4096, 64MiB or 1.5GB (KB is 1000, KiB is 1024)"


def parse_bytes(text: str | int, *, field: str = "size") -> int:
    """Read a byte size. ``KB`` is 1000 bytes and ``KiB`` 1024; case does not matter.

    Raises:
        ConfigError: It is not a size, is negative, or is not a whole number of bytes.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ConfigError(field, text, _REMEDY)
        return text
    match = _SIZE.fullmatch(str(text).strip()) if isinstance(text, str) else None
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(field, text, _REMEDY)
    size = Decimal(match[1]) * unit
    if size != int(size):
        raise ConfigError(field, text, _REMEDY)
    return int(size)


def format_bytes(size: int) -> str:
    """Write a byte size with a binary unit: exactly if a unit divides it, else with one decimal.

    ``format_bytes(67108864) == "64MiB"``, ``format_bytes(1500) == "1.5KiB"``.
    """
    if size < 0:
        raise ConfigError("size", size, "give a number of bytes that is not negative")
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min((max(size, 1).bit_length() - 1) // 10, len(units) - 1)
    value = size / 1024**power
    return f"{size >> (10 * power)}{units[power]}" if value == int(value) else f"{value:.1f}{units[power]}"
