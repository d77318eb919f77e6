"""From what the user asked for to a checked list of parts, before anything is started."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mooncake_plugins.errors import ConfigError
from mooncake_plugins.launch._gpus import split_gpus
from mooncake_plugins.launch._ports import free_ports
from mooncake_plugins.launch._profile import LaunchProfile, PartSpec
from mooncake_plugins.launch._rundir import RunDirectory
from mooncake_plugins.launch._shell import Part

ENGINE_HOST = "127.0.0.1"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Deployment:
    """The parts of one ``mooncake up``, engines first, the Conductor last."""

    engines: tuple[PartSpec, ...]
    conductor: PartSpec

    @property
    def endpoint(self) -> str:
        """The URL that clients use; a wildcard address is shown as loopback, which always works from this host."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.conductor.host, self.conductor.host)
        return f"http://[{host}]:{self.conductor.port}" if ":" in host else f"http://{host}:{self.conductor.port}"

    def check(self, engine: LaunchProfile, conductor: LaunchProfile) -> None:
        """Let the profiles check every part.

        Raises:
            LaunchError, ConfigError: As `LaunchProfile.check`.
        """
        for spec in self.engines:
            engine.check(spec)
        conductor.check(self.conductor)

    def parts(self, engine: LaunchProfile, conductor: LaunchProfile) -> list[Part]:
        """The parts as the supervisor takes them; the Conductor needs all engines."""
        engines = [Part(spec, engine.command(spec), engine.ready_url(spec)) for spec in self.engines]
        names = frozenset(spec.name for spec in self.engines)
        command, url = conductor.command(self.conductor), conductor.ready_url(self.conductor)
        return [*engines, Part(self.conductor, command, url, names)]

    def describe(self, process_groups: dict[str, int]) -> dict[str, Any]:
        """What ``deployment.json`` holds; a part that was not started has no process group."""
        return {
            "endpoint": self.endpoint,
            "parts": [
                {
                    "name": spec.name,
                    "role": spec.role,
                    "url": f"http://{spec.host}:{spec.port}",
                    "log": str(spec.log_path),
                    "process_group": process_groups.get(spec.name),
                }
                for spec in (*self.engines, self.conductor)
            ],
        }


def plan(
    model: str,
    *,
    prefill: int,
    decode: int,
    host: str,
    port: int,
    run_directory: RunDirectory,
    secret_file: Path,
    gpus: Sequence[str] = (),
    extra_args: Sequence[str] = (),
) -> Deployment:
    """Name the parts and give each its port, log and GPUs.

    Raises:
        LaunchError: Fewer GPUs than engines.
    """
    roles = [("prefill", index) for index in range(prefill)] + [("decode", index) for index in range(decode)]
    shares = split_gpus(gpus, len(roles))
    ports = free_ports(ENGINE_HOST, len(roles) + 1, avoid=port)
    base = PartSpec("", "", model, ENGINE_HOST, 0, Path(), run_directory.path, secret_file)
    engines = tuple(
        replace(
            base,
            name=f"{role}-{index}",
            role=role,
            port=engine_port,
            log_path=run_directory.log_path(f"{role}-{index}"),
            extra_args=tuple(extra_args),
            gpus=share,
        )
        for (role, index), engine_port, share in zip(roles, ports, shares, strict=False)
    )
    log_path = run_directory.log_path("conductor")
    conductor = replace(
        base, name="conductor", role="conductor", host=host, port=port or ports[-1], log_path=log_path, peers=engines
    )
    return Deployment(engines, conductor)


def check_model(model: str) -> str:
    """Refuse a model that cannot be there: a path that does not exist, or a folder without a model. Hub names pass.

    Returns:
        The model as engines take it: ``~`` is expanded.

    Raises:
        ConfigError: As said.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "params.json").is_file():
            raise ConfigError("MODEL", model, "this folder holds no model: it has no config.json")
    elif not path.is_file() and (model.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(model)):
        remedy = "there is no such folder; give the path of a model, or a name on a model hub, as organisation/name"
        raise ConfigError("MODEL", model, remedy)
    return str(path) if model.startswith("~") else model
