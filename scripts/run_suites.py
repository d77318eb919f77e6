#!/usr/bin/env python3
"""Run the test suites or the static checks, and say how long each took.

    run_suites.py test [SUITE…] [-- PYTEST ARGS…]
    run_suites.py check [CHECK…]

The last line is "N passed, M failed": tests, or checks. Environments are made when a suite needs them
(environments.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = (
    "mooncake_plugins",
    "store/mooncake_store",
    "conductor/mooncake_conductor",
    "connectors/vllm/mooncake_vllm",
    "connectors/sglang/mooncake_sglang",
    "scripts",
    "tests",
    "examples",
    "benchmarks",
)
TRANSFER = ("tests/wire", "tests/transports", "tests/metadata", "tests/transfer", "tests/testing")
PACKAGING = ("tests/packaging", "tests/repo")
MUTANTS = ("tests/mutants",)
NO_TESTS = 5  # exit code of pytest


@dataclass(frozen=True, slots=True)
class Suite:
    """Some tests, and the environment they need."""

    environment: str
    arguments: tuple[str, ...]


SUITES = {
    "unit": Suite("dev", ("-m", "not vllm", *(f"--ignore={path}" for path in (*TRANSFER, *PACKAGING, *MUTANTS)))),
    "transfer": Suite("dev", ("-m", "not vllm", *TRANSFER)),
    "packaging": Suite("dev", ("-m", "not vllm", *PACKAGING)),
    "mutants": Suite("dev", MUTANTS),
    "vllm": Suite("vllm", ("-m", "vllm", "-v")),
}
CHECKS: dict[str, tuple[str, ...]] = {
    "lint": ("ruff", "check", "."),
    "format": ("ruff", "format", "--check", "."),
    "types": ("mypy", *CODE),
    "types-pyright": ("basedpyright",),
    "layers": ("lint-imports",),
}


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a suite or check."""

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float


def environment(name: str) -> Path:
    """The environment of this checkout; made if needed."""
    command = [sys.executable, str(Path(__file__).with_name("environments.py")), name]
    made = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode != 0:
        sys.exit(f"error: environment {name!r} could not be made")
    return Path(made.stdout.splitlines()[-1])


def run(command: Sequence[str], folder: Path) -> int:
    """Run a command of an environment, as if it were activated."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    variables = os.environ | {"PATH": path, "VIRTUAL_ENV": str(folder)}
    return subprocess.run(command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, check=False).returncode


def run_suite(name: str, more: Sequence[str]) -> Result:
    """Run one suite of tests."""
    suite = SUITES[name]
    folder = environment(suite.environment)
    print(f"\n== {name} ==", flush=True)
    began = time.monotonic()
    existing = [word for word in suite.arguments if not word.startswith("tests/") or (ROOT / word).exists()]
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        python = str(folder / "bin" / "python")
        code = run([python, "-m", "pytest", *existing, f"--junitxml={report}", "--durations=5", *more], folder)
        passed, failed, skipped = read_report(report)
    if code != 0 and failed == 0:
        failed = 1
        print(
            f"{name}: " + ("no test was found" if code == NO_TESTS else f"pytest ended with exit code {code}"),
            flush=True,
        )
    return Result(name, passed, failed, skipped, time.monotonic() - began)


def read_report(path: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of a JUnit report; an absent or cut one has none."""
    try:
        suites = ElementTree.parse(path).getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return 0, 0, 0
    total = failed = skipped = 0
    for suite in suites:
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return total - failed - skipped, failed, skipped


def run_check(name: str) -> Result:
    """Run one static check."""
    folder = environment("dev")
    print(f"\n== {name} ==", flush=True)
    began = time.monotonic()
    absent = {path for path in CODE if not any((ROOT / path).rglob("*.py"))}
    code = run([word for word in CHECKS[name] if word not in absent], folder)
    return Result(name, int(code == 0), int(code != 0), 0, time.monotonic() - began)


def report(results: Sequence[Result]) -> int:
    """Print the table and the last line; the exit code."""
    print(f"\n{'':<16}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for one in results:
        print(f"{one.name:<16}{one.passed:>8}{one.failed:>8}{one.skipped:>9}{one.seconds:>9.1f}")
    failed = sum(one.failed for one in results)
    print(f"\n{sum(one.passed for one in results)} passed, {failed} failed", flush=True)
    return int(failed > 0)


def main(arguments: Sequence[str]) -> int:
    """See the head of this file."""
    kind, names = (arguments[0] if arguments else ""), list(arguments[1:])
    more: list[str] = []
    if "--" in names:
        cut = names.index("--")
        names, more = names[:cut], names[cut + 1 :]
    known = {"test": list(SUITES), "check": list(CHECKS)}.get(kind)
    if known is None:
        print(__doc__, file=sys.stderr)
        return 2
    if unknown := set(names) - set(known):
        print(f"error: unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [name for name in known if not names or name in names]
    return report([run_suite(name, more) if kind == "test" else run_check(name) for name in chosen])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
