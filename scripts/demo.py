#!/usr/bin/env python3
"""Serve a model with prefill and decode on separate engines, and prove that it answers as a single engine does.

Started by `make demo`. Runs `mooncake up MODEL --prefill 1 --decode 1` beside one plain vLLM engine, sends the same
requests to both, and compares token by token. Equal tokens alone would prove little, because whatever fails is computed
again: so the decode engine's own counters must also say that the KV came from the prefill engine.

Exit status: 0 if every answer is equal, every block came from prefill and nothing failed; 1 if not; 2 if something did
not start.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
BLOCK = 32
ENGINE_ARGUMENTS = [
    "--served-model-name", "demo", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs",
    "8", "--block-size", str(BLOCK), "--max-num-batched-tokens", "512", "--kv-cache-memory-bytes", str(64 << 20),
]  # fmt: skip
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


class DemoError(Exception):
    """Something did not start or did not answer."""


@dataclass(frozen=True)
class Request:
    """One completion to ask for."""

    prompt: list[int]
    max_tokens: int
    is_streamed: bool


@dataclass
class Result:
    """What came back, and when."""

    tokens: list[int]
    arrivals_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


def make_requests(seed: int) -> list[Request]:
    """Mixed lengths, a prefix that half of them share, every second one streamed."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, 270) for _ in range(count)]

    shared = tokens(12 * BLOCK)
    prompts = [tokens(n) for n in (6, 31, 32, 33, 250, 700, 1500, 1900)]
    prompts += [shared + tokens(n) for n in (10, 64, 90, 200, 400, 33, 5, 800)]
    return [Request(prompt, draw.randrange(16, 49), i % 2 == 0) for i, prompt in enumerate(prompts)]


# --- processes -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def port_of(url: str) -> str:
    return url.rpartition(":")[2]


@contextmanager
def running(name: str, argv: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a process group of its own, and end the group."""
    with log.open("wb") as sink:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT},
        )
    try:
        yield process
    finally:
        say(f"stopping {name}")
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGTERM, 40.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def wait_for(parts: dict[str, tuple[subprocess.Popen[bytes], str, Path]], timeout_s: float) -> None:
    """Wait until every part's URL answers, with a line now and then."""
    begun, said, waiting = time.monotonic(), 0.0, dict(parts)
    while waiting:
        for name, (process, url, log) in list(waiting.items()):
            if answers(url):
                say(f"{name} is ready after {time.monotonic() - begun:.0f} s")
                del waiting[name]
            elif process.poll() is not None:
                raise DemoError(f"{name} ended with status {process.returncode}; the end of {log}:\n{tail(log)}")
        elapsed = time.monotonic() - begun
        if elapsed > timeout_s:
            raise DemoError(f"{', '.join(waiting)} not ready within {timeout_s:.0f} s")
        if elapsed - said >= 15.0:
            said = elapsed
            say(f"waiting for {', '.join(waiting)} ({elapsed:.0f} s so far; engines take half a minute or more)")
        time.sleep(0.3)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def say(text: str) -> None:
    print(text, flush=True)


# --- requests --------------------------------------------------------------------------------------


def ask(url: str, request: Request) -> Result:
    """Send one request and collect its tokens with their times."""
    body = {
        "model": "demo", "prompt": request.prompt, "max_tokens": request.max_tokens, "temperature": 0, "ignore_eos":
        True, "return_token_ids": True, "stream": request.is_streamed,
    }  # fmt: skip
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=300)
    begun = time.monotonic()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise DemoError(f"{url} answered {answer.status}: {answer.read().decode(errors='replace')}")
        if not request.is_streamed:
            return Result(json.loads(answer.read())["choices"][0]["token_ids"])
        return collect(answer, begun)
    finally:
        connection.close()


def collect(answer: http.client.HTTPResponse, begun: float) -> Result:
    result = Result([])
    for line in answer:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        tokens = json.loads(line[6:])["choices"][0]["token_ids"]
        result.tokens += tokens
        result.arrivals_s += [time.monotonic() - begun] * len(tokens)
    return result


def ask_all(name: str, url: str, requests: Sequence[Request], at_once: int) -> list[Result]:
    """Send all requests, a few at a time, and keep their order."""
    say(f"sending {len(requests)} requests to {name}, {at_once} at a time")
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(ask, url, request) for request in requests]
        for done, _ in enumerate(concurrent.futures.as_completed(futures), 1):
            if done % 4 == 0:
                say(f"  {done} of {len(requests)} answered")
        return [future.result() for future in futures]


def counters(url: str) -> Counter[str]:
    """Read an engine's hand-off counters."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    rows = re.findall(r'^mooncake_handoff_events_total\{.*event="([^"]+)".*\} (\S+)$', text, re.M)
    return Counter({name: int(float(value)) for name, value in rows})


def settled_counters(url: str, pulls: int) -> Counter[str]:
    """Read the counters once they account for all pulls; engines publish them a step late."""
    deadline = time.monotonic() + 10.0
    while True:
        counts = counters(url)
        if counts["pulls_ok"] + counts["pulls_failed"] >= pulls or time.monotonic() > deadline:
            return counts
        time.sleep(0.1)


# --- the verdict -----------------------------------------------------------------------------------


def milliseconds(values: Sequence[float]) -> str:
    if not values:
        return "-"
    ordered = sorted(values)
    return f"{statistics.median(ordered) * 1e3:.0f} / {ordered[int(0.99 * (len(ordered) - 1))] * 1e3:.0f}"


def print_table(
    requests: Sequence[Request], pair: Sequence[Result], single: Sequence[Result], counts: Counter[str]
) -> None:
    transports = [
        f"{name.removeprefix('pulls_by_')} ({n} pulls)" for name, n in counts.items() if name.startswith("pulls_by_")
    ]
    timings = [
        (
            label,
            milliseconds([r.ttft_s for r in rows if r.arrivals_s]),
            milliseconds([g for r in rows for g in r.gaps_s]),
        )
        for label, rows in (("pair", pair), ("single engine", single))
    ]
    streamed = sum(request.is_streamed for request in requests)
    rows = [
        ("requests", f"{len(requests)} ({streamed} streamed, {len(requests) - streamed} plain)"),
        ("prompt tokens", str(sum(len(request.prompt) for request in requests))),
        ("output tokens", str(sum(len(result.tokens) for result in pair))),
        *[(f"TTFT p50 / p99, {label}", f"{ttft} ms") for label, ttft, _ in timings],
        *[(f"TBT p50 / p99, {label}", f"{tbt} ms") for label, _, tbt in timings],
        ("KV moved", f"{counts['bytes_received'] / 2**20:.1f} MiB"),
        ("path used", ", ".join(transports) or "none"),
        ("blocks loaded from prefill", str(counts["blocks_loaded"])),
        ("load failures", str(counts["pulls_failed"])),
        ("checksum mismatches", str(counts["checksum_mismatches"])),
    ]
    width = max(len(label) for label, _ in rows)
    say("")
    for label, value in rows:
        say(f"  {label:<{width}}  {value}")
    say("")


def verdict(
    requests: Sequence[Request], pair: Sequence[Result], single: Sequence[Result], counts: Counter[str]
) -> bool:
    """Say whether the demonstration succeeded."""
    different = [i for i, (a, b) in enumerate(zip(pair, single, strict=True)) if a.tokens != b.tokens]
    if different:
        say(f"{len(different)} of {len(requests)} outputs DIFFER from a single vLLM engine's: requests {different}.")
    else:
        say(f"Every output ({len(requests)} of {len(requests)}) equals a single vLLM engine's, token by token.")
    came_over = counts["pulls_ok"] == len(requests) and counts["blocks_loaded"] > 0
    failed = counts["pulls_failed"] + counts["checksum_mismatches"]
    if came_over and not failed:
        say(f"The KV of all {len(requests)} prompts came from the prefill engine; nothing was computed twice.")
    else:
        say(f"Only {counts['pulls_ok']} of {len(requests)} prompts got their KV from prefill; {failed} failures.")
        say(f"decode counted: {dict(counts)}")
    return not different and came_over and not failed


def run(model: Path, folder: Path, timeout_s: float) -> bool:
    endpoint, alone = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    up = [str(BIN / "mooncake"), "up", str(model), "--prefill", "1", "--decode", "1", "--port", port_of(endpoint),
          "--run-dir", str(folder / "up"), "--", *ENGINE_ARGUMENTS]  # fmt: skip
    single = [str(BIN / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", port_of(alone),
              *ENGINE_ARGUMENTS]  # fmt: skip
    say(f"logs: {folder}")
    say(f"$ mooncake up {model} --prefill 1 --decode 1 -- {' '.join(ENGINE_ARGUMENTS)}")
    say("  and one plain engine to compare with: vllm serve ...")
    up_log, single_log = folder / "mooncake-up.log", folder / "single-engine.log"
    with (
        running("mooncake up", up, up_log) as pair_process,
        running("the single engine", single, single_log) as process,
    ):
        wait_for({"mooncake up": (pair_process, f"{endpoint}/health", up_log),
                  "single engine": (process, f"{alone}/health", single_log)}, timeout_s)  # fmt: skip
        parts = {p["name"]: p["url"] for p in json.loads((folder / "up" / "deployment.json").read_text())["parts"]}
        requests = make_requests(seed=int.from_bytes(os.urandom(4), "little"))
        before = counters(parts["decode-0"])
        pair = ask_all("the pair", endpoint, requests, at_once=4)
        counts = settled_counters(parts["decode-0"], len(requests))
        counts.subtract(before)
        alone_results = ask_all("the single engine", alone, requests, at_once=4)
    print_table(requests, pair, alone_results, counts)
    cpus = os.cpu_count()
    say(f"(Times are no benchmark: {cpus} CPUs are shared by three engines, which busy-wait for their workers.)")
    return verdict(requests, pair, alone_results, counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for everything to start")
    given = parser.parse_args()
    try:
        return 0 if run(given.model.resolve(), Path(tempfile.mkdtemp(prefix="mooncake-demo-")), given.timeout) else 1
    except DemoError as error:
        say(f"error: {error}")
        return 2
    except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
        say(f"error: {error!r}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
