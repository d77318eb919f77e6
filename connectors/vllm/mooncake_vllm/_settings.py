"""The connector's settings out of vLLM's configuration and the environment, parsed once in each process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mooncake_plugins.config import Secret, from_sources, load_secret
from mooncake_plugins.errors import ConfigError
from mooncake_plugins.handoff import EngineRole, HandoffOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ROLES: dict[str, EngineRole] = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the connector needs to know in every process of an engine.

    Attributes:
        instance: This engine process's id; another one after a restart.
        role: What the engine does.
        secret: The cluster secret, if there is one.
    """

    instance: str
    role: EngineRole
    secret: Secret | None
    options: HandoffOptions

    @property
    def key(self) -> bytes:
        return b"" if self.secret is None else self.secret.key

    @property
    def listen_host(self) -> str:
        """Where workers listen; loopback without a secret unless told otherwise."""
        if self.options.listen_host:
            return self.options.listen_host
        if self.secret is None:
            return "127.0.0.1"
        from vllm.utils.network_utils import get_ip

        return cast(str, get_ip())


def settings_of(config: VllmConfig) -> Settings:
    """Read the settings: ``kv_connector_extra_config`` > ``MOONCAKE_HANDOFF_*`` > defaults.

    Raises:
        ConfigError: Unknown keys, or values that cannot be used.
    """
    transfer = config.kv_transfer_config
    if transfer is None or transfer.kv_role is None:
        raise ConfigError("kv_role", None, "give --kv-role prefill, decode or both")
    extra: dict[str, Any] = dict(transfer.kv_connector_extra_config)
    options = from_sources(HandoffOptions, "handoff", arguments=extra, environ=os.environ, file=None)
    return Settings(
        instance=f"{transfer.engine_id}-{config.instance_id}",
        role=_ROLES[transfer.kv_role],
        secret=load_secret(os.environ),
        options=options,
    )
