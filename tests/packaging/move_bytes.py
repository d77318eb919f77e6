"""Two processes move bytes with the installed package.

move_bytes.py serve TRANSPORT        registers memory and prints its address; ends when standard input ends
move_bytes.py fetch TRANSPORT        starts the other one, reads its memory, and prints what it found
"""

from __future__ import annotations

import subprocess
import sys

from mooncake_plugins.transfer import EngineOptions, Rights, TransferEngine

SIZE, BLOCK = 3 << 20, 64 << 10
PATTERN = bytes(index * 7 % 251 for index in range(SIZE))


def serve(transport: str) -> None:
    with TransferEngine(EngineOptions(transports=(transport,))) as engine:
        region = engine.register(bytearray(PATTERN), rights=Rights.READ)
        print(engine.address, region.offset, flush=True)
        sys.stdin.read()


def fetch(transport: str) -> None:
    command = [sys.executable, __file__, "serve", transport]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address, offset = server.stdout.readline().split()
        with TransferEngine(EngineOptions(transports=(transport,))) as engine:
            memory = bytearray(SIZE)
            region = engine.register(memory)
            peer = engine.open(address, timeout_s=20)
            for first in (0, 1):  # every other block, so that they are not merged into one range
                starts = range(first * BLOCK, SIZE, 2 * BLOCK)
                local, remote = ([base + start for start in starts] for base in (region.offset, int(offset)))
                engine.read(peer, local, remote, [BLOCK] * len(starts), deadline_s=60)
            print(
                "equal" if memory == PATTERN else "different",
                peer.path.transport,
                engine.metrics().get("throttle_pieces"),
            )


if __name__ == "__main__":
    {"serve": serve, "fetch": fetch}[sys.argv[1]](sys.argv[2])
