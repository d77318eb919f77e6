"""What a doctor check answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class CheckStatus(Enum):
    """How much a finding matters."""

    OK = "ok"
    INFO = "info"  # a fact; nothing to do
    WARN = "warn"  # works, but something is missing or slower than it could be
    FAIL = "fail"  # something this host was meant to do does not work


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One finding of ``mooncake doctor``."""

    name: str
    status: CheckStatus
    detail: str
    remedy: str = ""
