"""A third-party transport for tests: TCP whose reads can be held up or spoilt from outside.

Engines load it through an entry point, like any third party's. What it does is told by files in the folder
``MOONCAKE_TEST_FAULTS``, looked at once a read, so a test changes it while engines run:

    mode      "pass" (or absent): plain TCP.
              "gate": before each read, write `waiting` and wait for `go`, at most 60 s.
              "flip": flip one bit of the next read, once.
              "zero": every read delivers zeros.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from mooncake_plugins.plugins import Provider, hookimpl
from mooncake_plugins.transports import (
    Endpoint,
    Listener,
    Opcode,
    Reach,
    SegmentDescription,
    Transport,
    TransportHost,
    Work,
)
from mooncake_plugins.transports.tcp import TcpTransport
from mooncake_plugins.wire import Deadline

GATE_LIMIT_S = 60.0


class FaultyEndpoint(Endpoint):
    """Does what the control files say, then what TCP does."""

    def __init__(self, inner: Endpoint, folder: Path) -> None:
        self._inner, self._folder = inner, folder

    def execute(self, work: Work) -> None:
        mode = self._mode() if work.opcode is Opcode.READ else "pass"
        if mode == "gate":
            self._wait_for_go()
        self._inner.execute(work)
        if mode == "flip" and self._is_first():
            byte = ctypes.c_ubyte.from_address(int(work.addresses[0]))
            byte.value ^= 0x10
        if mode == "zero":
            for address, length in zip(work.addresses.tolist(), work.lengths.tolist(), strict=True):
                ctypes.memset(address, 0, length)

    def _mode(self) -> str:
        try:
            return (self._folder / "mode").read_text().strip()
        except FileNotFoundError:
            return "pass"

    def _is_first(self) -> bool:
        """Tell whether this read, of those that run at once, is the one to spoil: only one can take the file away."""
        try:
            (self._folder / "mode").rename(self._folder / "taken")
        except FileNotFoundError:
            return False
        return True

    def _wait_for_go(self) -> None:
        (self._folder / "waiting").write_text(str(os.getpid()))
        limit = time.monotonic() + GATE_LIMIT_S
        while not (self._folder / "go").exists() and time.monotonic() < limit:
            time.sleep(0.005)

    def interrupt(self) -> None:
        self._inner.interrupt()

    @property
    def is_usable(self) -> bool:
        return self._inner.is_usable

    def close(self) -> None:
        self._inner.close()


class FaultyTransport(Transport):
    """TCP under another name."""

    name = "faulty"
    capabilities = TcpTransport.capabilities

    def __init__(self) -> None:
        self._inner = TcpTransport()
        self._folder = Path(os.environ["MOONCAKE_TEST_FAULTS"])

    def listen(self, host: TransportHost) -> Listener:
        return self._inner.listen(host)

    def reach(self, host: TransportHost, peer: SegmentDescription) -> Reach:
        return Reach(True, "test faults", cost=1)

    def connect(self, host: TransportHost, peer: SegmentDescription, deadline: Deadline) -> Endpoint:
        return FaultyEndpoint(self._inner.connect(host, peer, deadline), self._folder)


@hookimpl
def mooncake_transports() -> list[Provider]:
    return [Provider("faulty", "faulty_transport:FaultyTransport")]
