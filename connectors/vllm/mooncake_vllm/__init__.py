"""The vLLM connector: prefill and decode on separate vLLM instances, started with ``vllm serve M --kv-connector mooncake``.

``register`` is what vLLM calls through the entry point group ``vllm.general_plugins``.
"""

from mooncake_vllm._register import CONNECTOR_NAME, register

__all__ = ["CONNECTOR_NAME", "register"]
