"""The built-in metadata backend does what every backend must."""

from __future__ import annotations

from mooncake_plugins.testing import MetadataTests, leak_check

__all__ = ["leak_check"]


class TestP2p(MetadataTests):
    metadata = "p2p"
