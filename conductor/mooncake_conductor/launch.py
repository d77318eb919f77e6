"""How ``mooncake up`` starts the Conductor."""

from __future__ import annotations

import importlib.util
import sys

from mooncake_plugins.errors import LaunchError
from mooncake_plugins.launch import Command, LaunchProfile, PartSpec

_NEEDED = ("httptools", "prometheus_client", "uvloop")
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


class ConductorProfile(LaunchProfile):
    """The Conductor as a child process; ``conductor.json`` in the run folder names its ports."""

    name = "conductor"

    def check(self, spec: PartSpec) -> None:
        """See `LaunchProfile.check`."""
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise LaunchError(f"the Conductor needs {', '.join(missing)}: pip install 'mooncake-plugins[conductor]'")
        if not spec.peers:
            raise LaunchError("the Conductor was given no engine")

    def command(self, spec: PartSpec) -> Command:
        """See `LaunchProfile.command`."""
        argv = [
            sys.executable,
            "-m",
            "mooncake_plugins.cli",
            "conductor",
            "--host",
            spec.host,
            "--port",
            str(spec.port),
        ]
        for peer in spec.peers:
            argv += [f"--{peer.role}", _url(peer)]
        if "--console-port" not in spec.extra_args:
            argv += ["--console-port", "0"]
        argv += ["--address-file", str(spec.run_dir / "conductor.json"), *spec.extra_args]
        return Command(tuple(argv), {"PYTHONUNBUFFERED": "1"})

    def ready_url(self, spec: PartSpec) -> str:
        """See `LaunchProfile.ready_url`."""
        return _url(spec) + "/health"


def _url(spec: PartSpec) -> str:
    host = _WILDCARDS.get(spec.host, spec.host)
    return f"http://[{host}]:{spec.port}" if ":" in host else f"http://{host}:{spec.port}"
