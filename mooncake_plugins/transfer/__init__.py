"""The Transfer Engine: registered memory, batches of reads and writes, grants."""

from __future__ import annotations

from mooncake_plugins.transports import Integrity, Opcode, Rights

from ._batch import Batch
from ._batch_machine import BatchStatus
from ._engine import TransferEngine
from ._grants import Fence, Grant
from ._options import EngineOptions
from ._peer import Peer, TransferPath
from ._regions import Region

__all__ = [
    "Batch",
    "BatchStatus",
    "EngineOptions",
    "Fence",
    "Grant",
    "Integrity",
    "Opcode",
    "Peer",
    "Region",
    "Rights",
    "TransferEngine",
    "TransferPath",
]
