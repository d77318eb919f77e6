"""The Conductor: an OpenAI-compatible front of prefill and decode engines.

``core`` decides (pure), ``dialects`` knows how each engine wants its requests, ``proxy`` moves bytes, ``console`` shows
what happens.
"""

from __future__ import annotations

__all__: list[str] = []
