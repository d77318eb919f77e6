"""The built-in transports do what every transport must."""

from __future__ import annotations

from mooncake_plugins.testing import TransportTests, leak_check

__all__ = ["leak_check"]


class TestLoopback(TransportTests):
    transport = "loopback"


class TestTcp(TransportTests):
    transport = "tcp"
