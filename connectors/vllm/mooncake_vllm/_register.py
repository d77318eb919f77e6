"""What happens when vLLM loads its general plugins: in every process of an engine, perhaps several times."""

from __future__ import annotations

import logging

from mooncake_vllm._amx import request_amx

log = logging.getLogger(__name__)

CONNECTOR_NAME = "mooncake"


def register() -> None:
    """Make the connector known to vLLM, add our flags, and ask the kernel for AMX. Idempotent and light."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from mooncake_vllm._flags import install_flags
    from mooncake_vllm._support import install_check

    if CONNECTOR_NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR_NAME, "mooncake_vllm.connector", "MooncakePluginsConnector")
    install_flags()
    install_check()
    request_amx()
