"""The fingerprint of a KV cache: everything that changes the *values* of KV for the same tokens, and nothing else.

Two engines may exchange KV only if their fingerprints are equal. Parallel ranks are not part of it: they are coordinates
inside the object (``Coordinate``).
"""

from __future__ import annotations

from collections.abc import Mapping

Fingerprint = Mapping[str, str | int]

_ABSENT = "(not stated)"


def fingerprint_differences(here: Fingerprint, there: Fingerprint) -> dict[str, tuple[str | int, str | int]]:
    """Name every field in which two fingerprints differ, with both values; empty when KV may be exchanged.

    A field that one side does not state differs from every value: silence is not agreement.
    """
    names = here.keys() | there.keys()
    pairs = {name: (here.get(name, _ABSENT), there.get(name, _ABSENT)) for name in sorted(names)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] or type(pair[0]) is not type(pair[1])}
