"""The vLLM connector: prefill and decode on separate vLLM instances, started with ``--kv-connector mooncake``.

``register`` is what vLLM calls through the entry point group ``vllm.general_plugins``. The others are for programs that
drive engines themselves, see ``docs/vllm.md``.
"""

from mooncake_vllm._offline import handoff_params, kv_transfer_config, new_ticket, read_description
from mooncake_vllm._register import CONNECTOR_NAME, register

__all__ = [
    "CONNECTOR_NAME",
    "handoff_params",
    "kv_transfer_config",
    "new_ticket",
    "read_description",
    "register",
]
