"""What one Conductor is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from mooncake_conductor.core import Engine, Role, SchedulingPolicy
from mooncake_conductor.dialects import EngineDialect
from mooncake_conductor.proxy._options import ProxyOptions
from mooncake_plugins.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ConductorConfig:
    """Engines by role, the two ports, and what decides.

    Attributes:
        engines: Role and URL of each engine.
        key: The cluster secret, which signs tickets; empty without one.
        engine_key: API key of the engines; empty: each client's own is passed on.
        console_key: Needed to read the console; empty: nobody asks, and it listens on loopback only.
        address_file: Where to write the two URLs once the Conductor is ready.
    """

    engines: tuple[tuple[Role, str], ...]
    policy: SchedulingPolicy
    dialect: EngineDialect
    host: str = "127.0.0.1"
    port: int = 8000
    console_host: str = "127.0.0.1"
    console_port: int = 9464
    key: bytes = field(default=b"", repr=False)
    engine_key: bytes = field(default=b"", repr=False)
    console_key: bytes = field(default=b"", repr=False)
    address_file: Path | None = None
    options: ProxyOptions = field(default_factory=ProxyOptions)

    def __post_init__(self) -> None:
        roles = {role for role, _ in self.engines}
        if not self.engines:
            raise ConfigError("engines", "none", "name some with --prefill and --decode, --both or --coupled")
        if Role.PREFILL in roles and not roles & {Role.DECODE, Role.BOTH}:
            raise ConfigError(
                "--decode", "none", "a prefill engine needs a decode engine; name one with --decode or --both"
            )
        if Role.DECODE in roles and not roles & {Role.PREFILL, Role.BOTH}:
            raise ConfigError(
                "--prefill", "none", "a decode engine needs a prefill engine; name one with --prefill or --both"
            )
        if not self.console_key and not is_loopback(self.console_host):
            raise ConfigError(
                "--console-host", self.console_host, "give --console-key-file, or keep the console on 127.0.0.1"
            )

    def make_engines(self) -> list[tuple[Engine, tuple[str, int]]]:
        """Engines and their addresses.

        Raises:
            ConfigError: A URL is not usable or stands twice.
        """
        made: dict[str, tuple[Engine, tuple[str, int]]] = {}
        for role, url in self.engines:
            name, address = parse_url(url, role)
            if name in made:
                raise ConfigError(
                    f"--{role.value}", url, "this engine is named twice; an engine for both roles is given with --both"
                )
            made[name] = Engine(name, role), address
        return list(made.values())


def parse_url(url: str, role: Role) -> tuple[str, tuple[str, int]]:
    """Normal form and address of an engine's URL.

    Raises:
        ConfigError: It is not ``http://HOST:PORT``.
    """
    remedy = "write http://HOST:PORT"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError as error:
        raise ConfigError(f"--{role.value}", url, f"{error}; {remedy}") from error
    if (
        parts.scheme != "http"
        or not host
        or parts.path not in ("", "/")
        or parts.query
        or parts.fragment
        or parts.username
    ):
        raise ConfigError(f"--{role.value}", url, remedy)
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}", (host, port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    return host in ("localhost", "::1") or host.startswith("127.")
