"""``docs/vllm.md`` names every setting and everything that is counted."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import mooncake_vllm

import mooncake_plugins.handoff
from mooncake_plugins.handoff import HandoffOptions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vllm.md").read_text()
CODE = "".join(
    file.read_text()
    for package in (mooncake_plugins.handoff, mooncake_vllm)
    for file in Path(package.__file__ or "").parent.glob("*.py")
)


def test_every_setting_is_documented() -> None:
    missing = [field.name for field in dataclasses.fields(HandoffOptions) if f"| `{field.name}` |" not in PAGE]
    assert missing == []


def test_every_counter_is_documented() -> None:
    """Counters with a changing end are in the page with that end in angle brackets."""
    names = set()
    for counter in re.findall(r"counters\[(.+?)\] \+=", CODE):
        names |= {re.sub(r"\{.*?\}$", "", name) for name in re.findall(r'f?"([a-z_]+(?:\{[^"]*\})?)"', counter)}
    names.discard("done")
    assert {"pulls_ok", "computed_here_", "transfers_withdrawn"} <= names
    missing = [name for name in names if f"`{name}`" not in PAGE and f"`{name}<" not in PAGE]
    assert missing == []


def test_every_reason_is_documented() -> None:
    reasons = set(re.findall(r'(?:TicketError|_refuse|_compute_here)\(\s*(?:\w+,\s*)?"([a-z_]+)"', CODE))
    reasons |= set(re.findall(r'\.decline\("([a-z_]+)"', CODE))
    assert {"forged", "role", "short", "unreachable"} <= reasons
    assert [reason for reason in reasons if f"`{reason}`" not in PAGE] == []
