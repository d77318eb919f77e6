"""What this distribution offers; named by its entry point."""

from __future__ import annotations

from mooncake_plugins.plugins import Provider, hookimpl


@hookimpl
def mooncake_transports() -> list[Provider]:
    """Offer the transport."""
    return [Provider("throttle", "mooncake_throttle.transport:ThrottleTransport", help="tcp with a speed limit")]
