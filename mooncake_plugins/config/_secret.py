"""The cluster secret: the bytes that all processes of one deployment share to authenticate each other.

It lives in a file that only its owner can read, never in an argument or an environment variable, because those are
visible to other users (``ps``, ``/proc``) and end up in logs.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mooncake_plugins.errors import ConfigError

SECRET_FILE_VARIABLE = "MOONCAKE_SECRET_FILE"
MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 4096
_MAKE_ONE = "make one with: (umask 077; head -c 32 /dev/urandom | base64 > FILE)"


@dataclass(frozen=True, slots=True)
class Secret:
    """A shared key. Its bytes are not part of ``repr``."""

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_length(self.key, "secret", "(not shown)")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Secret:
        """Read the secret from a file; one line end at the end is not part of it.

        Raises:
            ConfigError: The file is absent, not a regular file, readable or writable by group or others, shorter than
                16 bytes or longer than 4096.
        """
        shown = os.fspath(path)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ConfigError(
                SECRET_FILE_VARIABLE, shown, f"it cannot be read ({error.strerror}); {_MAKE_ONE}"
            ) from error
        try:
            _check_mode(os.fstat(descriptor).st_mode, shown)
            content = os.read(descriptor, MAX_SECRET_BYTES + 3)  # a line end, and one more to see that it is too long
        finally:
            os.close(descriptor)
        content = content.removesuffix(b"\n").removesuffix(b"\r")
        _check_length(content, SECRET_FILE_VARIABLE, shown)
        return cls(content)

    @classmethod
    def create_file(cls, path: str | os.PathLike[str]) -> Secret:
        """Write a fresh random secret to a new file that only this user can read.

        Raises:
            ConfigError: The file exists or cannot be written.
        """
        key = secrets.token_hex(32).encode()
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                SECRET_FILE_VARIABLE, os.fspath(path), f"it cannot be created ({error.strerror})"
            ) from error
        with open(descriptor, "wb") as file:
            file.write(key + b"\n")
        return cls(key)


def load_secret(environ: Mapping[str, str]) -> Secret | None:
    """The secret that ``MOONCAKE_SECRET_FILE`` points to, or None if the variable is not set.

    Raises:
        ConfigError: As `Secret.from_file`; also if the variable is set but empty.
    """
    path = environ.get(SECRET_FILE_VARIABLE)
    if path is None:
        return None
    if not path:
        raise ConfigError(SECRET_FILE_VARIABLE, path, "unset it, or name a file")
    return Secret.from_file(Path(path))


def _check_mode(mode: int, shown: str) -> None:
    if not stat.S_ISREG(mode):
        raise ConfigError(SECRET_FILE_VARIABLE, shown, f"it is not a regular file; {_MAKE_ONE}")
    if mode & 0o077:
        remedy = f"others can get at it (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {shown}"
        raise ConfigError(SECRET_FILE_VARIABLE, shown, remedy)


def _check_length(key: bytes, name: str, shown: str) -> None:
    if len(key) < MIN_SECRET_BYTES:
        raise ConfigError(
            name, shown, f"it holds {len(key)} bytes, at least {MIN_SECRET_BYTES} are needed; {_MAKE_ONE}"
        )
    if len(key) > MAX_SECRET_BYTES:
        raise ConfigError(name, shown, f"it holds more than {MAX_SECRET_BYTES} bytes; {_MAKE_ONE}")
