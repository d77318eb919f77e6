"""What an engine says of itself, and the keys under which requests carry hand-off fields."""

from __future__ import annotations

from typing import Literal

import msgspec

PARAMS_KEY = "mooncake"
"""The one key of ours inside a request's and an answer's ``kv_transfer_params``."""

DESCRIPTION_VERSION = 1

EngineRole = Literal["prefill", "decode", "both"]


class EngineDescription(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's answer to a ``describe`` request.

    Attributes:
        version: Version of the hand-off protocol.
        instance: Random id of this engine process; another one after a restart.
        role: What the engine was started as.
        addresses: Where its workers listen: ``"pp,tp"`` -> ``"host:port"``.
        fingerprint: See ``mooncake_plugins.kv``.
    """

    version: int
    instance: str
    role: EngineRole
    addresses: dict[str, str]
    fingerprint: dict[str, str | int]


class RequestParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hand-off fields of one request to an engine.

    Attributes:
        role: What the engine is to do: compute KV for another (``prefill``), pull it from another (``decode``), or only
            answer with its ``EngineDescription`` (``describe``).
        ticket: Signed ticket; absent for ``describe``.
    """

    role: Literal["prefill", "decode", "describe"]
    ticket: str = ""
