"""The vLLM connector: prefill and decode on separate vLLM instances, started with ``--kv-connector mooncake``.

``register`` is what vLLM calls through the entry point group ``vllm.general_plugins``. The others are for programs that
drive engines themselves, see ``docs/vllm.md``; they are imported on first use, because vLLM imports this package in all
its processes and ``mooncake --help`` looks for plugins in it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mooncake_vllm._register import CONNECTOR_NAME, register

if TYPE_CHECKING:
    from mooncake_vllm._offline import handoff_params, kv_transfer_config, new_ticket, read_description

__all__ = [
    "CONNECTOR_NAME",
    "handoff_params",
    "kv_transfer_config",
    "new_ticket",
    "read_description",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("mooncake_vllm._offline"), name)
