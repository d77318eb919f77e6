"""What the scheduler side keeps of each request that takes part in a hand-off."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from mooncake_plugins.handoff import Ticket


@dataclass(slots=True)
class PrefillRequest:
    """A request whose KV another instance pulls from here.

    Attributes:
        prompt: ``prompt_digest`` of its prompt.
        is_started: An attempt is running (it has blocks).
        is_complete: The whole prompt is computed.
    """

    ticket: Ticket
    prompt: bytes
    tokens: int
    is_started: bool = False
    is_complete: bool = False


class DecodePhase(Enum):
    """NEW → ASKING (prefill has not begun) → LOADING (workers pull) → LOADED; LOCAL: computed here."""

    NEW = auto()
    ASKING = auto()
    LOADING = auto()
    LOADED = auto()
    LOCAL = auto()


@dataclass(slots=True)
class DecodeRequest:
    """A request whose KV is pulled from another instance.

    Attributes:
        owner: With ``n > 1`` the engine makes one request an answer, all with one ticket. The first pulls; this names
            it for the
            others, which wait for it and then find its blocks in the prefix cache.
    """

    ticket: Ticket
    text: str
    prompt: bytes
    tokens: int
    owner: str = ""
    phase: DecodePhase = DecodePhase.NEW


def parent_of(request_id: str) -> str:
    """Return what the requests of one ``n > 1`` call have in common: vLLM names the children ``<index>_<parent>``."""
    index, _, parent = request_id.partition("_")
    return parent if index.isdigit() and parent else request_id
