"""The cluster secret and the file it lives in."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mooncake_plugins.config import SECRET_FILE_VARIABLE, Secret, load_secret
from mooncake_plugins.errors import ConfigError

KEY = b"0123456789abcdef"


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_reads_the_key_without_a_line_end(tmp_path: Path, end: bytes) -> None:
    assert Secret.from_file(write(tmp_path / "s", KEY + end)).key == KEY


def test_inner_line_ends_and_spaces_belong_to_the_key(tmp_path: Path) -> None:
    assert Secret.from_file(write(tmp_path / "s", KEY + b" \n\n")).key == KEY + b" \n"


def test_the_key_is_not_in_the_repr() -> None:
    assert KEY.decode() not in repr(Secret(KEY))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o644])
def test_refuses_a_file_that_others_can_get_at(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "s", KEY, mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600 {path}") as caught:
        Secret.from_file(path)
    assert caught.value.field == SECRET_FILE_VARIABLE


@pytest.mark.parametrize("content", [b"", b"short", b"0123456789abcde\n"])
def test_refuses_a_short_key(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match="at least 16"):
        Secret.from_file(write(tmp_path / "s", content))


def test_refuses_a_huge_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than 4096"):
        Secret.from_file(write(tmp_path / "s", b"x" * 10_000))


def test_an_absent_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="umask 077"):
        Secret.from_file(tmp_path / "absent")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_refuses_what_is_no_file_without_blocking(tmp_path: Path, make: object) -> None:
    path = tmp_path / "odd"
    make(path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="not a regular file"):
        Secret.from_file(path)


def test_create_file_writes_what_from_file_reads(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    made = Secret.create_file(path)
    assert Secret.from_file(path) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(made.key) == 64
    with pytest.raises(ConfigError, match="cannot be created"):
        Secret.create_file(path)
    assert Secret.from_file(path) == made


def test_two_secrets_differ(tmp_path: Path) -> None:
    assert Secret.create_file(tmp_path / "a") != Secret.create_file(tmp_path / "b")


def test_load_secret(tmp_path: Path) -> None:
    path = write(tmp_path / "s", KEY)
    assert load_secret({}) is None
    assert load_secret({SECRET_FILE_VARIABLE: str(path)}) == Secret(KEY)
    with pytest.raises(ConfigError, match="unset it"):
        load_secret({SECRET_FILE_VARIABLE: ""})
