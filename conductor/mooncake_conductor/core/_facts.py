"""What the scheduler knows of a request and of an engine's purpose."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Role(Enum):
    """What an engine may be used for."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"
    COUPLED = "coupled"
    """An engine without our connector: it serves whole requests and is never paired."""


class RequestFacts(NamedTuple):
    """One request as the scheduler sees it.

    Attributes:
        model: Name of the model asked for.
        is_streamed: The answer is wanted token by token.
        whole: Why the request must not be split over two engines; None when it may be.
        prompt_bytes: Length of the prompt's JSON text, a measure of its prefill.
    """

    model: str
    is_streamed: bool = False
    whole: str | None = None
    prompt_bytes: int = 0
