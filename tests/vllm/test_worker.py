"""Where vLLM's cache lies in memory, what names its content, and what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mooncake_vllm._fingerprint import fingerprint_of
from mooncake_vllm._metrics import HandoffPromMetrics, HandoffStats
from mooncake_vllm._worker import block_layout, cache_places

from mooncake_plugins.errors import ConfigError
from mooncake_plugins.handoff import HostCache
from mooncake_plugins.kv import fingerprint_differences
from mooncake_plugins.transfer import EngineOptions, TransferEngine
from tests.vllm.modelless import engine_config

LAYERS, BLOCKS, SHAPE = 4, 10, (2, 32, 16)


def vllm_cache(dtype: torch.dtype = torch.float32, block_shape: tuple[int, ...] = SHAPE) -> dict[str, torch.Tensor]:
    """Return a cache as vLLM allocates it on a CPU: one storage, a view a layer, random content."""
    block = int(np.prod(block_shape))
    flat = torch.randn(LAYERS * BLOCKS * block).to(dtype)
    whole = flat.view(LAYERS, BLOCKS, *block_shape)
    return {f"model.layers.{layer}.self_attn.attn": whole[layer] for layer in range(LAYERS)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_share_a_storage_are_found_in_it(dtype: torch.dtype) -> None:
    cache = vllm_cache(dtype)
    storages, places, blocks = cache_places(cache)
    assert (len(storages), len(places), blocks) == (1, LAYERS, BLOCKS)
    for place, tensor in zip(places, cache.values(), strict=True):
        for block in range(BLOCKS):
            start = place.offset + block * place.stride
            wanted = tensor[block].contiguous().view(torch.uint8).numpy().tobytes()
            assert storages[place.storage][start : start + place.block_bytes].tobytes() == wanted


def test_layers_with_storages_of_their_own() -> None:
    storages, places, _ = cache_places({str(i): torch.zeros(BLOCKS, *SHAPE) for i in range(3)})
    assert len(storages) == 3
    assert [place.storage for place in places] == [0, 1, 2]


def test_what_is_written_through_the_places_is_in_the_tensor() -> None:
    cache = vllm_cache()
    storages, places, _ = cache_places(cache)
    place = places[2]
    start = place.offset + 7 * place.stride
    storages[place.storage][start : start + place.block_bytes] = 0
    tensors = list(cache.values())
    assert not tensors[2][7].any()
    assert tensors[2][6].all() and tensors[2][8].all() and tensors[1][7].all()


def test_blocks_survive_a_transfer_between_two_caches() -> None:
    """Other physical blocks on either side; compared through torch, not through our own arithmetic."""
    source, target = vllm_cache(), vllm_cache()
    with TransferEngine(EngineOptions()) as here, TransferEngine(EngineOptions()) as there:
        caches = []
        for engine, tensors in ((there, source), (here, target)):
            storages, places, blocks = cache_places(tensors)
            caches.append(HostCache(engine, storages, places, blocks))
        theirs, ours = np.asarray([1, 4, 9], np.int64), np.asarray([8, 0, 3], np.int64)
        peer = here.open(there.address, timeout_s=5)
        remote, local = caches[0].layout.offsets(0, LAYERS, theirs), caches[1].layout.offsets(0, LAYERS, ours)
        here.read(peer, local, remote, caches[1].layout.lengths(0, LAYERS, 3), deadline_s=10)
    for name in source:
        assert torch.equal(target[name][ours.tolist()], source[name][theirs.tolist()])


def test_blocks_that_are_not_one_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="contiguous"):
        cache_places({"a": torch.zeros(BLOCKS, *SHAPE).transpose(1, 2)})


def test_other_memory_than_the_hosts_is_refused() -> None:
    with pytest.raises(ConfigError, match="host memory"):
        cache_places({"a": torch.zeros(BLOCKS, *SHAPE, device="meta")})


def test_layers_with_different_numbers_of_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="same number"):
        cache_places({"a": torch.zeros(4, *SHAPE), "b": torch.zeros(5, *SHAPE)})


# --- fingerprint -------------------------------------------------------------------------------------------------


def fingerprint(model: Path, **options: Any) -> dict[str, str | int]:
    config = engine_config(model, "kv_both", **options)
    return fingerprint_of(config, block_layout(config, torch.zeros(1, *SHAPE, dtype=config.model_config.dtype)))


def test_engines_that_agree_have_equal_fingerprints(models: tuple[Path, Path]) -> None:
    assert fingerprint(models[0]) == fingerprint(models[0], max_num_batched_tokens=128, max_model_len=1024)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"dtype": "bfloat16"}, {"dtype", "layout"}),
        ({"block_size": 64}, {"block_size"}),
        ({"kv_cache_dtype": "fp8_e5m2"}, {"kv_cache_dtype"}),
    ],
)
def test_what_changes_kv_changes_the_fingerprint(model: Path, options: dict[str, Any], fields: set[str]) -> None:
    differences = fingerprint_differences(fingerprint(model), fingerprint(model, **options))
    assert fields <= differences.keys()


def test_other_weights_have_another_fingerprint(models: tuple[Path, Path]) -> None:
    first, second = map(fingerprint, models)
    assert fingerprint_differences(first, second).keys() == {"model"}


def test_the_layout_names_the_kernel_and_the_shape(model: Path) -> None:
    layout = block_layout(engine_config(model), torch.zeros(3, *SHAPE))
    assert layout.startswith("cpu-") and layout.endswith("2x32x16-float32")


# --- metrics -----------------------------------------------------------------------------------------------------


def test_stats_add_up() -> None:
    total = HandoffStats.of({"pulls": 1}, [(0.2, 0.1)]).aggregate(HandoffStats.of({"pulls": 2, "x": 1}, [(0.4, 0.3)]))
    assert total.data == {"counts": {"pulls": 3, "x": 1}, "durations": [(0.2, 0.1), (0.4, 0.3)]}
    assert total.reduce() == {"pulls": 3, "x": 1, "pull_seconds_p50": 0.4}
    assert not total.is_empty()
    total.reset()
    assert total.is_empty() and total.reduce() == {}


def test_stats_become_series(make_config: Any) -> None:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram

    kinds = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    series = HandoffPromMetrics(make_config(), kinds, ["engine"], {0: ["0"]})
    try:
        series.observe(HandoffStats.of({"pulls_ok": 2}, [(0.5, 0.25)]).data)
        events = REGISTRY.get_sample_value("mooncake_handoff_events_total", {"engine": "0", "event": "pulls_ok"})
        exposed = REGISTRY.get_sample_value("mooncake_handoff_exposed_seconds_sum", {"engine": "0"})
        assert (events, exposed) == (2, 0.25)
    finally:
        for collector in (series._events, series._seconds, series._exposed):
            REGISTRY.unregister(collector)
