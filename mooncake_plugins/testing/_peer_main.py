"""The child process behind `PeerProcess`: an engine that obeys one JSON command per line."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

import numpy as np

from mooncake_plugins.errors import MooncakeError
from mooncake_plugins.transfer import EngineOptions, Fence, Grant, Integrity, Opcode, Peer, Region, TransferEngine
from mooncake_plugins.transports import _vectored


class Child:
    """State of the child, one method per command."""

    def __init__(self, options: dict[str, Any]) -> None:
        if options.get("transports") is not None:
            options["transports"] = tuple(options["transports"])
        self.engine = TransferEngine(EngineOptions(**options))
        self.memory: dict[int, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        self.regions: dict[int, Region] = {}
        self.peers: dict[str, Peer] = {}
        self.grants: dict[str, Grant] = {}

    def register(self, size: int, fill: int) -> dict[str, Any]:
        memory = np.full(size, fill, np.uint8)
        region = self.engine.register(memory)
        self.memory[region.offset], self.regions[region.offset] = memory, region
        return {"offset": region.offset}

    def pattern(self, offset: int, seed: int) -> dict[str, Any]:
        memory = self.memory[offset]
        memory[:] = np.random.default_rng(seed).integers(0, 256, memory.size, np.uint8)
        return {}

    def fill(self, offset: int, value: int) -> dict[str, Any]:
        self.memory[offset][:] = value
        return {}

    def count(self, offset: int, value: int) -> dict[str, Any]:
        return {"count": int((self.memory[offset] == value).sum())}

    def unregister(self, offset: int, timeout_s: float) -> dict[str, Any]:
        self.engine.unregister(self.regions[offset], timeout_s)
        return {}

    def grant(self, offset: int, length: int, deadline_s: float) -> dict[str, Any]:
        grant = self.engine.grant([offset], [length], deadline_s=deadline_s)
        self.grants[grant.token.hex()] = grant
        return {"token": grant.token.hex()}

    def revoke(self, token: str, timeout_s: float) -> dict[str, Any]:
        return {"is_fenced": self.grants[token].revoke(timeout_s) is Fence.FENCED}

    def transfer(
        self,
        opcode: str,
        address: str,
        local: int,
        remote: int,
        length: int,
        deadline_s: float,
        token: str | None = None,
        integrity: str = "none",
    ) -> dict[str, Any]:
        if address not in self.peers:
            self.peers[address] = self.engine.open(address, timeout_s=10)
        batch = self.engine.submit(
            self.peers[address],
            Opcode(opcode),
            [local],
            [remote],
            [length],
            deadline_s=deadline_s,
            grant=None if token is None else bytes.fromhex(token),
            integrity=Integrity(integrity),
        )
        status = batch.wait(deadline_s + 10)
        return {"status": status.value, "error": type(batch.error).__name__, "bytes_done": batch.bytes_done}

    def stop_after(self, call: str, nth: int) -> dict[str, Any]:
        """Stop this process (SIGSTOP) right after its nth bulk system call ``send`` or ``recv`` from now on."""
        original = getattr(_vectored.Vector, call)
        left = [nth]

        def counted(*arguments: Any) -> int:
            moved: int = original(*arguments)
            left[0] -= 1
            if left[0] == 0:
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this very thread stops first
            return moved

        setattr(_vectored.Vector, call, counted)
        return {}

    def metrics(self) -> dict[str, Any]:
        return dict(self.engine.metrics())


def main() -> None:
    """Obey until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing but answers may go there
    child = Child(json.loads(sys.argv[1]))
    try:
        print(json.dumps({"ok": {"address": child.engine.address}}), file=answers, flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            name = command.pop("command")
            try:
                answer = {"ok": getattr(child, name)(**command)}
            except MooncakeError as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        child.engine.abort()


if __name__ == "__main__":
    main()
