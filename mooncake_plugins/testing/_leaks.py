"""Finds threads, file descriptors and shared-memory files that a test leaves behind."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class LeakSnapshot:
    """What is open at one moment."""

    threads: frozenset[int]
    descriptors: frozenset[int]
    shm_files: frozenset[str]

    @classmethod
    def take(cls) -> LeakSnapshot:
        """Look now."""
        threads = frozenset(t.ident for t in threading.enumerate() if t.ident is not None)
        names = frozenset(path.name for path in _SHM.iterdir()) if _SHM.is_dir() else frozenset()
        return cls(threads, frozenset(_open_descriptors()), names)

    def leaks_since(self) -> list[str]:
        """Describe what is open now and was not then."""
        now = LeakSnapshot.take()
        threads = [f"thread {t.name}" for t in threading.enumerate() if t.ident in now.threads - self.threads]
        descriptors = [f"descriptor {fd} -> {_target(fd)}" for fd in sorted(now.descriptors - self.descriptors)]
        files = [f"/dev/shm/{name}" for name in sorted(now.shm_files - self.shm_files) if "mooncake" in name]
        return threads + descriptors + files


def _open_descriptors() -> list[int]:
    found = [int(name) for name in os.listdir("/proc/self/fd")]
    return [fd for fd in found if os.path.exists(f"/proc/self/fd/{fd}") or _target(fd) != "closed"]


def _target(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "closed"


@pytest.fixture
def leak_check() -> Iterator[None]:
    """Fail the test if it leaves a thread, a descriptor or a shared-memory file of ours behind."""
    gc.collect()
    before = LeakSnapshot.take()
    yield
    until = time.monotonic() + 5.0
    leaks = before.leaks_since()
    while leaks and time.monotonic() < until:  # threads that were told to end may need a moment
        gc.collect()
        time.sleep(0.01)
        leaks = before.leaks_since()
    assert not leaks, f"left behind: {leaks}"
