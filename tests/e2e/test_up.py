"""The end of a deployment that ``mooncake up`` started. Runs last, because it ends the pair that others use."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.client import eventually
from tests.e2e.fleets import Fleet


def test_the_death_of_a_part_stops_everything_and_says_which(pair: Fleet, workdir: Path) -> None:
    deployment = json.loads((workdir / "up" / "deployment.json").read_text())
    (group,) = [part["process_group"] for part in deployment["parts"] if part["name"] == "decode-0"]
    os.killpg(group, signal.SIGKILL)
    up = pair.processes["up"]
    assert up.wait(60.0) == 1
    assert "decode-0" in up.tail() and "SIGKILL" in up.tail()
    groups = {part["process_group"] for part in deployment["parts"]}
    eventually(lambda: not live_members(groups), what=f"processes of {groups} have ended")


def live_members(groups: set[int]) -> list[int]:
    """Return the processes of these groups that are not zombies."""
    rows = [text.rpartition(")")[2].split() for text in _stats()]
    return [int(row[2]) for row in rows if row[0] != "Z" and int(row[2]) in groups]


def _stats() -> Iterator[str]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            yield stat.read_text()
