"""Measures the hand-off without engines at real model shapes: from "computed on prefill" to "reported on decode".

Two processes with the real services, over tcp: this one is the decode worker, a child the prefill worker. The child
plays the engine: it says layer after layer and chunk after chunk that the blocks are computed, either at once ("burst":
the transfer decides how long it takes) or at a pace ("paced": how much of the transfer is hidden behind the prefill).
Block ids are scattered on both sides. Bytes are hashed on both sides and compared ("verify on"), or only on the prefill
side.

The caches hold some layers only (``--resident-layers``); further layers lie over them, with the same bytes in both
processes. So a prompt of 32k tokens of a 70B model (10 GiB of KV) needs about 1 GiB per process, and still each of its
bytes is sent, received and hashed. ``--full`` gives every layer memory of its own.

    python benchmarks/handoff/shapes.py --out benchmarks/handoff/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from mooncake_plugins.handoff import (
    HandoffOptions,
    HandoffStep,
    HostCache,
    LayerPlace,
    PrefillWork,
    PullRequest,
    PullResult,
    PullService,
    SourceIdentity,
    SourceService,
    Ticket,
    sign_ticket,
)
from mooncake_plugins.kv import Coordinate, blocks_covering
from mooncake_plugins.transfer import EngineOptions, TransferEngine

PACKAGES = ("numpy", "msgspec", "xxhash", "mooncake-plugins")
FINGERPRINT: dict[str, str | int] = {"benchmark": "shapes"}
ATTACH_S = 0.1


@dataclass(frozen=True)
class Shape:
    """A model's KV cache: bytes of a token in one layer, and how blocks are cut."""

    model: str
    layers: int
    token_bytes: int
    block_tokens: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return self.token_bytes * self.block_tokens


SHAPES = (
    Shape("Llama-3-70B", 80, 4096, 16),  # 320 KiB a token: 8 KV heads of 128, keys and values, 2 bytes
    Shape("MLA-61", 61, (512 + 64) * 2, 64),  # one latent and one rope part a token, 2 bytes
)


def host_cache(engine: TransferEngine, shape: Shape, blocks: int, resident: int, *, filled: bool) -> HostCache:
    """A cache of ``resident`` layers over which the others lie, too."""
    layer_bytes = blocks * shape.block_bytes
    storages = [
        np.full(layer_bytes, 1, np.uint8) for _ in range(min(resident, shape.layers))
    ]  # touched: no page faults
    if filled:
        random = np.random.default_rng(0)
        for storage in storages:
            storage.view(np.uint64)[:] = random.integers(0, 1 << 63, layer_bytes // 8, np.uint64)
    places = [
        LayerPlace(layer % len(storages), 0, shape.block_bytes, shape.block_bytes) for layer in range(shape.layers)
    ]
    return HostCache(engine, storages, places, blocks)


def identity(name: str) -> SourceIdentity:
    """Who a worker is."""
    return SourceIdentity(name, FINGERPRINT, Coordinate())


def cpu_seconds() -> float:
    """CPU seconds of this process, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# --- the prefill process ---------------------------------------------------------------------------------------------


def serve(pipe: Connection, shape: Shape, blocks: int, resident: int) -> None:
    """A prefill worker; plays the engine for one prompt per command."""
    with TransferEngine(EngineOptions(transports=("tcp",))) as engine:
        cache = host_cache(engine, shape, blocks, resident, filled=True)
        service = SourceService(engine, cache, identity("prefill"), b"", HandoffOptions())
        pipe.send(engine.address)
        while (command := pipe.recv()) is not None:
            before = cpu_seconds()
            began, ended = prefill(service, shape, blocks, **command)
            while not service.take_finished():
                time.sleep(0.001)
            pipe.send((began, ended, cpu_seconds() - before))
        service.close()


def prefill(service: SourceService, shape: Shape, blocks: int, transfer: str, chunk_blocks: int, pace_s: float
            ) -> tuple[float, float]:  # fmt: skip
    """Say that a prompt is computed, chunk by chunk and layer by layer; when the first and the last layer were."""
    ids = tuple(np.random.default_rng(1).permutation(blocks).tolist())
    began = now = time.monotonic()
    for first in range(0, blocks, chunk_blocks):
        after = min(first + chunk_blocks, blocks)
        work = PrefillWork(transfer, "request", 600.0, b"prompt", blocks * shape.block_tokens,
                           ids if first == 0 else (), first == 0, 0, after)  # fmt: skip
        service.begin_step(HandoffStep(work=[work]))
        for layer in range(shape.layers):
            now += pace_s
            time.sleep(max(0.0, now - time.monotonic()))
            service.layer_computed(layer)
        service.end_step()
    ended = time.monotonic()
    service.begin_step(HandoffStep(held=[(transfer, "request")]))
    return began, ended


# --- the decode process ----------------------------------------------------------------------------------------------


@contextmanager
def prefill_process(shape: Shape, blocks: int, resident: int) -> Iterator[tuple[Connection, str]]:
    """The child, and the address of its worker."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=serve, args=(theirs, shape, blocks, resident), daemon=True)
    child.start()
    try:
        yield pipe, pipe.recv()
        pipe.send(None)
        child.join(30)
    finally:
        child.kill()


def wait_for_result(service: PullService) -> tuple[PullResult, float]:
    """The result of the one pull, and when it was reported."""
    while not (results := service.take_results()):
        service.wait_for_result(1.0)
    return results[0], time.monotonic()


@dataclass(frozen=True)
class Bench:
    """One model's cache in both processes."""

    shape: Shape
    blocks: int
    chunk_blocks: int
    pipe: Connection
    address: str
    engine: TransferEngine
    cache: HostCache

    @property
    def steps(self) -> int:
        """How often the prefill says that a layer is computed."""
        return self.shape.layers * -(-self.blocks // self.chunk_blocks)

    def case(self, *, verify: bool, readers: int, rounds: int) -> Iterator[dict[str, Any]]:
        """Measure bursts, then prefills that take somewhat longer than the transfer alone would."""
        options = HandoffOptions(verify=verify, readers=readers, transfer_timeout_s=600)
        service = PullService(self.engine, self.cache, identity("decode"), options)
        self.pull(service, 0.0)  # connections, page tables
        bursts = [self.pull(service, 0.0) for _ in range(rounds)]
        pace_s = 1.25 * statistics.median(row["seconds"] for row in bursts) / self.steps
        paced = [self.pull(service, pace_s) for _ in range(rounds)]
        service.close()
        for pace, rows in (("burst", bursts), ("paced", paced)):
            for number, row in enumerate(rows):
                yield {"verify": verify, "pace": pace, "round": number, **row}

    def pull(self, service: PullService, pace_s: float) -> dict[str, Any]:
        """Hand one prompt over; the figures."""
        ticket = Ticket(uuid.uuid4().hex, "prefill", {"0,0": self.address}, time.time() + 600)
        ids = tuple(np.random.default_rng(2).permutation(self.blocks).tolist())
        tokens = self.blocks * self.shape.block_tokens
        text = sign_ticket(ticket, b"")
        service.start([PullRequest("request", ticket.id, text, ticket.addresses, b"prompt", tokens, 0, ids)])
        time.sleep(ATTACH_S)
        cpu, load, hidden = cpu_seconds(), os.getloadavg()[0], service.counters["bytes_hidden"]
        self.pipe.send({"transfer": ticket.id, "chunk_blocks": self.chunk_blocks, "pace_s": pace_s})
        result, reported = wait_for_result(service)
        cpu = cpu_seconds() - cpu
        began, ended, prefill_cpu = self.pipe.recv()
        total = self.blocks * self.shape.block_bytes * self.shape.layers
        if result.outcome != "ok" or result.received_bytes != total:
            raise SystemExit(f"a hand-off failed, so nothing was measured: {result}")
        return {
            "bytes": total,
            "seconds": reported - began,
            "gb_per_s": total / (reported - began) / 1e9,
            "prefill_seconds": ended - began,
            "exposed_seconds": reported - ended,
            "hidden_share": (service.counters["bytes_hidden"] - hidden) / total,
            "cpu_s_per_gb_decode": cpu / (total / 1e9),
            "cpu_s_per_gb_prefill": prefill_cpu / (total / 1e9),
            "load_1min": load,
        }


def measure(shape: Shape, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of one model."""
    blocks = blocks_covering(arguments.tokens, shape.block_tokens)
    chunk_blocks = max(1, arguments.chunk_tokens // shape.block_tokens)
    resident = shape.layers if arguments.full else arguments.resident_layers
    with (
        prefill_process(shape, blocks, resident) as (pipe, address),
        TransferEngine(EngineOptions(transports=("tcp",))) as engine,
    ):
        cache = host_cache(engine, shape, blocks, resident, filled=False)
        bench = Bench(shape, blocks, chunk_blocks, pipe, address, engine, cache)
        return [
            {**asdict(shape), "tokens": arguments.tokens, **row}
            for verify in (True, False)
            for row in bench.case(verify=verify, readers=arguments.readers, rounds=arguments.rounds)
        ]


# --- what is written -------------------------------------------------------------------------------------------------


COLUMNS = (
    ("GB", "bytes", "{:.2f}", 1e9),
    ("s", "seconds", "{:.2f}", 1),
    ("GB/s", "gb_per_s", "{:.2f}", 1),
    ("s after the last layer", "exposed_seconds", "{:.3f}", 1),
    ("hidden", "hidden_share", "{:.0%}", 1),
    ("CPU-s/GB decode", "cpu_s_per_gb_decode", "{:.2f}", 1),
    ("CPU-s/GB prefill", "cpu_s_per_gb_prefill", "{:.2f}", 1),
)


def table(rows: list[dict[str, Any]]) -> str:
    """Medians per case, as Markdown."""
    cases: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["model"], "on" if row["verify"] else "off", row["pace"]), []).append(row)
    titles = ["model", "verify", "prefill", *(title for title, *_ in COLUMNS), "best GB/s"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for case, found in cases.items():
        cells = [form.format(statistics.median(r[name] for r in found) / unit) for _, name, form, unit in COLUMNS]
        best = f"{max(row['gb_per_s'] for row in found):.2f}"
        lines.append(f"| {' | '.join([*case, *cells, best])} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
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


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="length of the prompt (default: 32768)")
    parser.add_argument("--chunk-tokens", type=int, default=8192, help="tokens a prefill step (default: 8192)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per case (default: 5)")
    parser.add_argument("--readers", type=int, default=2, help="reader threads of decode (default: 2)")
    parser.add_argument("--resident-layers", type=int, default=8, help="layers with memory of their own (default: 8)")
    parser.add_argument("--full", action="store_true", help="memory for every layer: 10 GiB a process at 32768 tokens")
    parser.add_argument("--model", choices=[shape.model for shape in SHAPES], help="only this model")
    parser.add_argument("--out", type=Path, help="write the raw result here")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """See the head of this file."""
    arguments = parse(words)
    start = machine()
    rows = []
    for shape in SHAPES:
        if arguments.model in (None, shape.model):
            rows += measure(shape, arguments)
    print(table(rows))
    if arguments.out:
        command = ["python", "benchmarks/handoff/shapes.py", *words]
        result = {"command": command, "machine": start, "versions": versions(), "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
