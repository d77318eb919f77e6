"""What the core itself offers, through the same hooks as everybody else."""

from __future__ import annotations

from mooncake_plugins.plugins._markers import hookimpl
from mooncake_plugins.plugins._provider import Provider


@hookimpl
def mooncake_transports() -> list[Provider]:
    """Offer the transports that need nothing but the operating system."""
    return [
        Provider("loopback", "mooncake_plugins.transports.loopback:LoopbackTransport", help="inside one process"),
        Provider("tcp", "mooncake_plugins.transports.tcp:TcpTransport", help="sockets, between any two hosts"),
    ]


@hookimpl
def mooncake_metadata_backends() -> list[Provider]:
    """Offer peer-to-peer metadata."""
    return [Provider("p2p", "mooncake_plugins.metadata.p2p:P2pMetadata", help="asks the peer itself at host:port")]


@hookimpl
def mooncake_commands() -> list[Provider]:
    """Offer the commands that belong to no other part."""
    return [
        Provider(
            "doctor",
            "mooncake_plugins.cli._doctor:doctor",
            help="Say what this host can do, and how to fix what it cannot.",
        ),
        Provider(
            "plugins",
            "mooncake_plugins.cli._plugins:plugins",
            help="List what is offered, what loads, and why something does not.",
        ),
        Provider(
            "up", "mooncake_plugins.cli._up:up", help="Start and supervise engines and the Conductor for one model."
        ),
    ]


@hookimpl
def mooncake_doctor_checks() -> list[Provider]:
    """Offer the checks of the host itself."""
    return [Provider("host", "mooncake_plugins.cli._host:check_host", help="Python, memory, devices, limits")]
