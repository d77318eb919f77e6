"""Measures the hand-off's data path at real model shapes, without engines: READ over tcp between two processes.

The source process holds the KV cache of a prefill instance as a ring of blocks; this process pulls layer by layer
into the ring of a decode instance, block ids scattered on both sides, as the hand-off does. A prompt larger than the
ring is streamed through it. Prints a table and writes raw JSON.

    python benchmarks/transfer/handoff_shapes.py --out benchmarks/transfer/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from mooncake_plugins.transfer import Batch, BatchStatus, EngineOptions, Integrity, Opcode, TransferEngine

PACKAGES = ("numpy", "msgspec", "xxhash", "mooncake-plugins")


@dataclass(frozen=True)
class Shape:
    """KV bytes per token and layer: Llama-3-70B 320 KiB over 80 layers, MLA (512 + 64) elements of 2 bytes."""

    model: str
    layers: int
    token_bytes_per_layer: int
    block_tokens: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return self.token_bytes_per_layer * self.block_tokens


SHAPES = (
    Shape("Llama-3-70B", 80, 4096, 16),
    Shape("Llama-3-70B", 80, 4096, 32),
    Shape("MLA-61", 61, (512 + 64) * 2, 16),
    Shape("MLA-61", 61, (512 + 64) * 2, 32),
)


def cpu_seconds() -> float:
    """CPU seconds of this process, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def serve(pipe: Connection, ring_bytes: int) -> None:
    """The source: registers a ring of memory and answers how much CPU it has used."""
    memory = np.random.default_rng(0).integers(0, 256, ring_bytes, np.uint8)
    with TransferEngine(EngineOptions(transports=("tcp",))) as engine:
        region = engine.register(memory, name="kv")
        pipe.send((engine.address, region.offset))
        while pipe.recv() == "cpu":
            pipe.send(cpu_seconds())


def pull(
    engine: TransferEngine,
    peer: Any,
    here: int,
    there: int,
    shape: Shape,
    tokens: int,
    ring_bytes: int,
    window: int,
    integrity: Integrity,
) -> int:
    """Pull one prompt layer by layer, at most ``window`` layers at a time; return the bytes moved."""
    blocks = tokens // shape.block_tokens
    slots = ring_bytes // shape.block_bytes
    random = np.random.default_rng(1)
    pending: list[Batch] = []
    moved = 0
    for layer in range(shape.layers):
        # Each layer's blocks lie scattered in one part of the ring, another part for each of the layers under way.
        parts = max(1, slots // blocks)
        base = (layer % parts) * blocks if parts > 1 else 0
        count = min(blocks, slots)
        local = (base + random.permutation(count)) * shape.block_bytes
        remote = (base + random.permutation(count)) * shape.block_bytes
        lengths = np.full(count, shape.block_bytes, np.int64)
        pending.append(
            engine.submit(peer, Opcode.READ, here + local, there + remote, lengths, deadline_s=120, integrity=integrity)
        )
        moved += count * shape.block_bytes
        while len(pending) >= window:
            finish(pending.pop(0))
    for batch in pending:
        finish(batch)
    return moved


def finish(batch: Batch) -> None:
    """A benchmark with a failed transfer measures nothing."""
    if batch.wait(130) is not BatchStatus.DONE:
        raise SystemExit(f"transfer failed: {batch.error}")


def measure(pipe: Connection, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every shape, with and without checksums, in turns."""
    pipe_address, there = pipe.recv()
    ring_bytes = arguments.ring_mib << 20
    memory = np.zeros(ring_bytes, np.uint8)
    rows: list[dict[str, Any]] = []
    options = EngineOptions(transports=("tcp",), connections_per_peer=arguments.connections)
    with TransferEngine(options) as engine:
        here = engine.register(memory, name="kv").offset
        peer = engine.open(pipe_address, timeout_s=30)
        for round_number in range(arguments.rounds):
            for shape in SHAPES:
                for integrity in (Integrity.NONE, Integrity.XXH3_64):
                    before = cpu_seconds(), remote_cpu(pipe), time.perf_counter()
                    moved = pull(
                        engine, peer, here, there, shape, arguments.tokens, ring_bytes, arguments.window, integrity
                    )
                    seconds = time.perf_counter() - before[2]
                    cpu = cpu_seconds() - before[0], remote_cpu(pipe) - before[1]
                    rows.append(
                        {
                            **asdict(shape),
                            "integrity": integrity.value,
                            "round": round_number,
                            "bytes": moved,
                            "seconds": seconds,
                            "gb_per_s": moved / seconds / 1e9,
                            "cpu_s_per_gb_decode": cpu[0] / (moved / 1e9),
                            "cpu_s_per_gb_prefill": cpu[1] / (moved / 1e9),
                            "load_1min": os.getloadavg()[0],
                        }
                    )
    return rows


def remote_cpu(pipe: Connection) -> float:
    """CPU seconds of the source process."""
    pipe.send("cpu")
    used: float = pipe.recv()
    return used


def table(rows: list[dict[str, Any]]) -> str:
    """Medians per case, as Markdown."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["model"], row["block_tokens"], row["integrity"]), []).append(row)
    lines = [
        "| model | block tokens | checksum | GB per prompt | GB/s median | best | CPU-s/GB decode | prefill |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, block, integrity), found in cases.items():
        speeds = [row["gb_per_s"] for row in found]
        decode, prefill = (
            statistics.median(row[f"cpu_s_per_gb_{side}"] for row in found) for side in ("decode", "prefill")
        )
        lines.append(
            f"| {model} | {block} | {integrity} | {found[0]['bytes'] / 1e9:.2f} | {statistics.median(speeds):.2f} "
            f"| {max(speeds):.2f} | {decode:.2f} | {prefill:.2f} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_at_start": os.getloadavg(),
    }


def versions() -> dict[str, str]:
    """Versions of what takes part."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed (checkout)"
    return found


def main() -> None:
    """Parse arguments, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="prompt length")
    parser.add_argument("--ring-mib", type=int, default=1024, help="memory on each side")
    parser.add_argument("--window", type=int, default=2, help="layers under way at once")
    parser.add_argument("--connections", type=int, default=2, help="connections per peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="raw results as JSON")
    arguments = parser.parse_args()
    start = machine()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    source = context.Process(target=serve, args=(theirs, arguments.ring_mib << 20))
    source.start()
    try:
        rows = measure(ours, arguments)
        ours.send("end")
    finally:
        source.join(30)
        if source.is_alive():
            source.kill()
    print(table(rows))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python", *sys.argv])
        raw = {
            "command": command,
            "machine": start,
            "versions": versions(),
            "load_at_end": os.getloadavg(),
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
