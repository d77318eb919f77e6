"""Byte sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_plugins.config import format_bytes, parse_bytes
from mooncake_plugins.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        (4096, 4096),
        ("64MiB", 64 << 20),
        (" 64 mib ", 64 << 20),
        ("1.5GB", 1_500_000_000),
        ("0.5KiB", 512),
        ("7b", 7),
        ("2TiB", 2 << 40),
        ("1PB", 10**15),
    ],
)
def test_parse(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "-1MiB", "1.3", "1.0001KiB", "1 MiB 2", "1e6", "64M", "0x10", "٣", "nan", -1]
)
def test_parse_refuses(text: str | int) -> None:
    with pytest.raises(ConfigError, match="pool_bytes.*KiB is 1024") as caught:
        parse_bytes(text, field="pool_bytes")
    assert (caught.value.field, caught.value.value) == ("pool_bytes", text)


@pytest.mark.parametrize("value", [None, True, 1.5, b"1"])
def test_parse_refuses_other_types(value: object) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (1500, "1.5KiB"),
        (64 << 20, "64MiB"),
        (1 << 60, "1024PiB"),
        ((1 << 20) - 1, "1024.0KiB"),
    ],
)
def test_format(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_format_refuses_negative() -> None:
    with pytest.raises(ConfigError):
        format_bytes(-1)


@given(st.integers(0, 2000), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB", "PiB"]))
def test_what_is_formatted_exactly_is_read_back(count: int, unit: str) -> None:
    size = parse_bytes(f"{count}{unit}")
    text = format_bytes(size)
    assert "." in text or parse_bytes(text) == size
