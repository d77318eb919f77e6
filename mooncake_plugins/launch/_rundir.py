"""The folder of one run: logs, the secret, and a description of what runs where."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mooncake_plugins.config import Secret
from mooncake_plugins.errors import ConfigError


class RunDirectory:
    """A folder that only this user can read. `close` removes the secret that was made for the run; logs stay.

    Raises:
        ConfigError: The folder cannot be made, or already holds something.
    """

    def __init__(self, path: Path) -> None:
        try:
            existed = path.exists()
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_empty = not any(path.iterdir())
        except OSError as error:
            raise ConfigError("--run-dir", str(path), f"it cannot be used as a folder ({error.strerror})") from error
        if not is_empty:
            raise ConfigError("--run-dir", str(path), "it already holds files; name a new or empty folder")
        self.path = path.resolve()
        self._own_secret: Path | None = None
        self._is_own = not existed

    @staticmethod
    def default_path(environ: Mapping[str, str]) -> Path:
        """``$XDG_STATE_HOME/mooncake/runs/<time>-<process id>``; the state folder is ``~/.local/state`` by default."""
        state = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or Path.home()) / ".local" / "state"
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return Path(state) / "mooncake" / "runs" / f"{stamp}-{os.getpid()}"

    def log_path(self, part: str) -> Path:
        """Where the output of a part goes."""
        return self.path / f"{part}.log"

    def make_secret(self) -> Path:
        """A file with a fresh secret for this run."""
        path = self.path / "secret"
        Secret.create_file(path)
        self._own_secret = path
        return path

    def describe(self, description: Mapping[str, Any]) -> None:
        """Write ``deployment.json``, for programs that want to find the parts. Readers never see half of it."""
        path = self.path / "deployment.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    def close(self) -> None:
        """Remove the secret that was made for this run, and the folder if it was made here and is empty. Idempotent."""
        if self._own_secret is not None:
            self._own_secret.unlink(missing_ok=True)
            self._own_secret = None
        if self._is_own:
            with contextlib.suppress(OSError):  # it holds logs
                self.path.rmdir()
