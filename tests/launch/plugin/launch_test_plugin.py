"""A plugin for the tests of ``mooncake up``: small real processes as engines and as Conductor."""

from __future__ import annotations

import sys
from pathlib import Path

from mooncake_plugins.errors import LaunchError
from mooncake_plugins.launch import Command, LaunchProfile, PartSpec
from mooncake_plugins.plugins import Provider, hookimpl

PART = Path(__file__).with_name("part.py")


class ToyProfile(LaunchProfile):
    """Runs ``part.py``; ``--in NAME:BEHAVIOUR`` after ``--`` makes one part misbehave."""

    name = "toy"

    def check(self, spec: PartSpec) -> None:
        if "--refuse" in spec.extra_args:
            raise LaunchError("toy engine 0.1 is too old; install 0.2 or newer")

    def command(self, spec: PartSpec) -> Command:
        if "--no-program" in spec.extra_args and spec.role == "decode":
            return Command(("/no/such/program",))
        argv = (sys.executable, str(PART), str(spec.run_dir), spec.name, spec.host, str(spec.port), *spec.extra_args)
        return Command(argv, {"TOY_ROLE": spec.role})

    def ready_url(self, spec: PartSpec) -> str:
        return f"http://{spec.host}:{spec.port}/health"


class ToyConductor(ToyProfile):
    """The same program; it records its peers."""

    name = "conductor"

    def command(self, spec: PartSpec) -> Command:
        (spec.run_dir / "peers").write_text(" ".join(f"{peer.role}:{peer.port}" for peer in spec.peers))
        extra = next((peer.extra_args for peer in spec.peers), ())
        argv = (sys.executable, str(PART), str(spec.run_dir), spec.name, spec.host, str(spec.port), *extra)
        return Command(argv)


@hookimpl
def mooncake_launch_profiles() -> list[Provider]:
    """Offer both."""
    return [
        Provider("toy", "launch_test_plugin:ToyProfile"),
        Provider("conductor", "launch_test_plugin:ToyConductor"),
        Provider("uninstalled", "no_such_engine:Profile", help="never loads"),
    ]
