"""What tests of this project and of third-party plugins share. Needs pytest.

from mooncake_plugins.testing import TransportTests, leak_check

class TestMyTransport(TransportTests):
    transport = "mine"
"""

from __future__ import annotations

from ._leaks import LeakSnapshot, leak_check
from ._metadata_tests import MetadataTests
from ._peer import PeerProcess
from ._transport_tests import TransportTests
from ._waiting import wait_until

__all__ = ["LeakSnapshot", "MetadataTests", "PeerProcess", "TransportTests", "leak_check", "wait_until"]
