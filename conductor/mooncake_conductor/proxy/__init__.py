"""The data path: clients' connections, engines' connections, and what happens between them.

Importing this package needs no optional library.
"""

from __future__ import annotations

from mooncake_conductor.proxy._client import ClientConnection, Site
from mooncake_conductor.proxy._errors import ApiError
from mooncake_conductor.proxy._frontend import Frontend
from mooncake_conductor.proxy._httptools import load_httptools
from mooncake_conductor.proxy._members import Membership
from mooncake_conductor.proxy._metrics import Metrics
from mooncake_conductor.proxy._options import ProxyOptions
from mooncake_conductor.proxy._pool import EnginePool

__all__ = [
    "ApiError",
    "ClientConnection",
    "EnginePool",
    "Frontend",
    "Membership",
    "Metrics",
    "ProxyOptions",
    "Site",
    "load_httptools",
]
