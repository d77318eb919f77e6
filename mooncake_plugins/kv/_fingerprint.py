"""The fingerprint of a KV cache: everything that changes the *values* of KV for the same tokens, and nothing else.

Two engines may exchange KV only if their fingerprints are equal. Parallel ranks are not part of it: they are
coordinates inside the object (``Coordinate``).
"""

from __future__ import annotations

from collections.abc import Mapping

Fingerprint = Mapping[str, str | int]

_ABSENT = "(not stated)"


def fingerprint_differences(here: Fingerprint, there: Fingerprint) -> dict[str, tuple[str | int, str | int]]:
    """Name every field in which two fingerprints differ, with both values; empty when KV may be exchanged.

    A field that one side does not state differs from every value: silence is not agreement.
    """
    names = [name for name in sorted(here.keys() | there.keys()) if not _agree(name, here, there)]
    return {name: (here.get(name, _ABSENT), there.get(name, _ABSENT)) for name in names}


def _agree(name: str, here: Fingerprint, there: Fingerprint) -> bool:
    if name not in here or name not in there:
        return False
    return here[name] == there[name] and type(here[name]) is type(there[name])
