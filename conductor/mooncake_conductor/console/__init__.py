"""What happens inside a Conductor, on a port of its own: Prometheus metrics and JSON state. No prompt text."""

from __future__ import annotations

from mooncake_conductor.console._site import Console

__all__ = ["Console"]
