"""The fingerprint of a vLLM engine's KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mooncake_plugins.kv import weights_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def fingerprint_of(config: VllmConfig, layout: str) -> dict[str, str | int]:
    """Name everything that changes the values of KV, or how a block's bytes hold them.

    Args:
        config: The engine's configuration.
        layout: How bytes lie inside a block on this device; opaque, compared only.

    Blocking: reads samples of the weight files.
    """
    import vllm

    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    return {
        "engine": "vllm",
        # Blocks are copied as bytes and their inside belongs to the attention kernels of this version.
        "engine_version": str(vllm.__version__),
        "model": weights_digest(str(model.model), model.revision),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization),
        "rope": str(
            getattr(model.hf_text_config, "rope_parameters", None)
            or getattr(model.hf_text_config, "rope_scaling", None)
        ),
        "block_size": int(cache.block_size),
        "layers": int(model.get_total_num_hidden_layers()),
        "kv_heads": int(model.get_total_num_kv_heads()),
        "head_size": int(model.get_head_size()),
        "tensor_parallel": int(parallel.tensor_parallel_size),
        "pipeline_parallel": int(parallel.pipeline_parallel_size),
        "layout": layout,
    }
