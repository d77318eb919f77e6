"""What this connector cannot work with, said before anything is started.

An exception inside a worker leaves vLLM hanging, so the check runs in the front end, when the engine's configuration
is made; the connector checks again for itself.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from mooncake_plugins.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger(__name__)

_MARK = "_mooncake_check"


def check_supported(config: VllmConfig) -> None:
    """Refuse combinations that cannot work.

    Raises:
        ConfigError: Names the setting, its value and the remedy.
    """
    parallel, model = config.parallel_config, config.model_config
    transfer = config.kv_transfer_config
    spread = "blocks would be spread over ranks in a way this connector does not know"
    rows: list[tuple[bool, str, object, str]] = [
        (parallel.data_parallel_size > 1, "--data-parallel-size", parallel.data_parallel_size,
         "start that many engines instead; the Conductor balances them"),
        (parallel.decode_context_parallel_size > 1, "--decode-context-parallel-size",
         parallel.decode_context_parallel_size, spread),
        (parallel.prefill_context_parallel_size > 1, "--prefill-context-parallel-size",
         parallel.prefill_context_parallel_size, spread),
        (config.speculative_config is not None, "--speculative-config", "set",
         "draft KV is not handed over; leave it out"),
        (model.is_encoder_decoder, "model", model.model,
         "encoder-decoder models have KV that is not paged by prompt tokens"),
        (model.runner_type == "pooling", "--runner", "pooling", "only generating models have a decode stage"),
        (bool(transfer is not None and transfer.enable_permute_local_kv), "enable_permute_local_kv", True,
         "both sides must keep the same layout"),
    ]  # fmt: skip
    for is_wrong, name, value, remedy in rows:
        if is_wrong:
            raise ConfigError(f"{name} with --kv-connector mooncake", value, remedy)
    if config.device_config.device_type != "cpu":
        raise ConfigError(
            "device with --kv-connector mooncake", config.device_config.device_type,
            "this release moves host memory only: KV in device memory needs the cuda transport, which is not there yet",
        )  # fmt: skip


def check_groups(groups: int) -> None:
    """Refuse hybrid models.

    Raises:
        ConfigError: The model has more than one group of KV layers.
    """
    if groups != 1:
        raise ConfigError(
            "KV cache groups", groups, "hybrid models (sliding window, Mamba) cannot be handed over by this release"
        )


def install_check() -> None:
    """Wrap ``EngineArgs.create_engine_config`` once, so that what cannot work is refused by the front end."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        config = original(self, *args, **kwargs)
        transfer = config.kv_transfer_config
        if transfer is not None and transfer.kv_connector == "mooncake":
            check_supported(config)
            from mooncake_vllm._settings import settings_of

            settings_of(config)
            if transfer.kv_load_failure_policy != "recompute":
                log.warning(
                    "kv_load_failure_policy is %r: a failed hand-off fails its request; "
                    'add "kv_load_failure_policy": "recompute" to compute it again instead',
                    transfer.kv_load_failure_policy,
                )
        return config

    setattr(create_engine_config, _MARK, True)
    EngineArgs.create_engine_config = create_engine_config
