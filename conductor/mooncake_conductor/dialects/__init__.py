"""How the Conductor talks with each kind of engine: request bodies of the legs, the describe probe, its errors."""

from __future__ import annotations

from mooncake_conductor.dialects._base import Endpoint, EngineDialect, Probe
from mooncake_conductor.dialects._body import Body, BodyError, parse_body
from mooncake_conductor.dialects._vllm import VllmDialect

__all__ = ["Body", "BodyError", "Endpoint", "EngineDialect", "Probe", "VllmDialect", "parse_body"]
