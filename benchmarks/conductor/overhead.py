"""What the Conductor costs per request and per relayed chunk. See README.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCES = [HERE.parents[1], HERE.parents[1] / "conductor", HERE.parents[1] / "store"]
SIZES = (512, 49152)
TICKS = os.sysconf("SC_CLK_TCK")
Row = dict[str, Any]


class Server:
    """A child process that prints one line when it is ready. ``cpu`` is its user and system time."""

    def __init__(self, argv: list[str], cpus: set[int] | None) -> None:
        pin = (lambda: os.sched_setaffinity(0, cpus)) if cpus else None
        env = dict(os.environ, PYTHONPATH=os.pathsep.join([*map(str, SOURCES), os.environ.get("PYTHONPATH", "")]))
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env, preexec_fn=pin)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        if not self.line:
            raise SystemExit(f"did not start: {shlex.join(argv)}")

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    @property
    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Bench:
    """Engines, the three set-ups, and the load."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        every = sorted(os.sched_getaffinity(0))
        pins = options.pin and len(every) > 1
        self.router_cpus = {every[0]} if pins else None
        self.rest = set(every[1:]) if pins else None
        self.servers: dict[str, Server] = {}
        self.ports: dict[str, int] = {}
        half = max(1, options.engines // 2)
        roles = ["coupled"] * options.engines + ["prefill"] * half + ["decode"] * half
        self.engines = Server([sys.executable, str(HERE / "mock_engine.py"), *roles], self.rest)
        ports = self.engines.line.split()
        coupled, prefill, decode = ports[: options.engines], ports[options.engines : -half], ports[-half:]
        self.ports["direct"] = int(coupled[0])
        self._start_floor(coupled)
        self._start("coupled", [f"--coupled=http://127.0.0.1:{port}" for port in coupled])
        self._start(
            "pd",
            [
                f"--{role}=http://127.0.0.1:{p}"
                for role, some in (("prefill", prefill), ("decode", decode))
                for p in some
            ],
        )

    def _start_floor(self, engines: list[str]) -> None:
        port = self.ports["floor"] = free_port()
        self.servers["floor"] = Server(
            [sys.executable, str(HERE / "raw_relay.py"), str(port), *engines], self.router_cpus
        )

    def _start(self, name: str, engines: list[str]) -> None:
        port = self.ports[name] = free_port()
        command = [
            sys.executable,
            "-m",
            "mooncake_plugins.cli",
            "conductor",
            "--port",
            str(port),
            "--console-port",
            "0",
        ]
        self.servers[name] = Server([*command, "--log-level", "warning", *engines], self.router_cpus)

    def stop(self) -> None:
        for server in (*self.servers.values(), self.engines):
            server.stop()

    def load(
        self,
        name: str,
        connections: int,
        seconds: float,
        size: int,
        tokens: int = 0,
        interval: int = 0,
        rate: float = 0,
    ) -> Row:
        program = (
            [str(Path(self.options.tools) / "load_gen")]
            if self.options.tools
            else [sys.executable, str(HERE / "load_gen.py")]
        )
        arguments = [str(value) for value in (self.ports[name], connections, seconds, size, tokens, interval, rate)]
        server = self.servers.get(name)
        cpus = self.rest
        pin = (lambda: os.sched_setaffinity(0, cpus)) if cpus else None
        before = server.cpu_s if server else 0.0
        output = subprocess.run(
            [*program, *arguments], stdout=subprocess.PIPE, check=True, timeout=seconds + 60, preexec_fn=pin
        ).stdout
        row: Row = json.loads(output)
        if server:
            row |= {"cpu_s": server.cpu_s - before, "rss_mb": server.rss_mb}
        return row | {"router": name, "load_average": os.getloadavg()[0]}

    def round(self, number: int) -> list[Row]:
        """One measurement of everything; the order rotates."""
        o, rows = self.options, []
        names = list(self.servers)
        names = names[number % len(names) :] + names[: number % len(names)]
        for name in names:
            rows += [self.load(name, o.connections, o.seconds, size) | {"test": f"closed {size}"} for size in SIZES]
        for name in ["direct", *names]:
            rows.append(self.load(name, 64, o.seconds, 2048, rate=o.rate) | {"test": "latency"})
        for name in names:
            rows.append(self.load(name, o.streams, max(o.seconds, 2.0), 512, 64, 20_000) | {"test": "stream"})
        return [row | {"round": number} for row in rows]


def middle(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def summarise(rows: list[Row], name: str) -> dict[str, float | None]:
    """Medians over the rounds; added latency is the difference to ``direct`` in the same round."""
    mine = [row for row in rows if row["router"] == name]

    def of(test: str) -> list[Row]:
        return [row for row in mine if row["test"] == test]

    found: dict[str, float | None] = {}
    for size in SIZES:
        found[f"us/req {size / 1024:g} KB"] = middle([row["cpu_s"] / row["done"] * 1e6 for row in of(f"closed {size}")])
        found[f"req/s {size / 1024:g} KB"] = middle([row["rps"] for row in of(f"closed {size}")])
    for quantile in ("p50", "p99"):
        direct = {row["round"]: row[quantile] for row in rows if row["router"] == "direct"}
        found[f"+{quantile} us"] = middle([row[quantile] - direct[row["round"]] for row in of("latency")])
    found["us/chunk"] = middle([row["cpu_s"] / max(1, row["chunks"]) * 1e6 for row in of("stream")])
    found["RSS MB"] = max(row["rss_mb"] for row in mine)
    found["errors"] = sum(row["errors"] for row in mine)
    return found


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("mooncake-plugins", "uvloop", "httptools", "msgspec"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "checkout"
    return found


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def show(table: dict[str, dict[str, float | None]]) -> None:
    columns = list(next(iter(table.values())))
    lines = [["", *columns], *([name, *(_cell(row[column]) for column in columns)] for name, row in table.items())]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns) + 1)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--rate", type=float, default=200.0, help="requests/s of the latency test")
    parser.add_argument("--pin", action="store_true", help="routers on one CPU, engines and load on the others")
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--tools", default=os.environ.get("MOONCAKE_BENCH_TOOLS"), help="folder with another load_gen")
    parser.add_argument("--json", type=Path, help="keep every measurement")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 2, 1.0
    rows: list[Row] = []
    bench = Bench(options)
    try:
        for number in range(options.rounds):
            rows += bench.round(number)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    finally:
        bench.stop()
    table = {name: summarise(rows, name) for name in bench.servers}
    busiest, host = max(row["load_average"] for row in rows), machine()
    print(
        f"{host['cpu']}, {host['cpus']} CPUs, highest load average {busiest:.1f}"
        + (" (busy: distrust latencies)" if busiest > 2 * host["cpus"] else "")
    )
    show(table)
    if options.json:
        kept = {
            "command": shlex.join(sys.argv),
            "time": time.strftime("%FT%TZ", time.gmtime()),
            "machine": host,
            "versions": versions(),
        }
        options.json.write_text(json.dumps(kept | {"summary": table, "measurements": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
