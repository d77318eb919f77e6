"""One Conductor process: its configuration, and its life from the first probe to the last answer."""

from __future__ import annotations

from mooncake_conductor.worker._config import ConductorConfig
from mooncake_conductor.worker._service import Addresses, serve
from mooncake_conductor.worker._uvloop import run

__all__ = ["Addresses", "ConductorConfig", "run", "serve"]
