"""The worker side of the connector: the engine's cache in a Transfer Engine, and the services of the hand-off."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata

from mooncake_plugins.errors import ConfigError
from mooncake_plugins.handoff import HostCache, LayerPlace, PullResult, PullService, SourceIdentity, SourceService
from mooncake_plugins.kv import Coordinate
from mooncake_plugins.transfer import EngineOptions, TransferEngine
from mooncake_vllm._fingerprint import fingerprint_of
from mooncake_vllm._scheduler import StepMetadata
from mooncake_vllm._settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger(__name__)

UInt8Array = npt.NDArray[np.uint8]

# How long a step without tokens waits for a transfer to end. Without it the engine core would spin through empty steps
# and take the CPU from those who move the bytes; a new request waits at most this long.
_IDLE_WAIT_S = 0.002


@dataclass(slots=True)
class WorkerAddress(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler side at start."""

    address: str
    fingerprint: dict[str, str | int]


class WorkerSide:
    """Moves KV in one worker process. The engine's worker thread calls it; nothing blocks but the idle wait."""

    def __init__(self, config: VllmConfig, settings: Settings) -> None:
        self._config, self._settings = config, settings
        self._engine: TransferEngine | None = None
        self._source: SourceService | None = None
        self._pull: PullService | None = None
        self._layers: dict[str, int] = {}
        self._address: WorkerAddress | None = None
        self._is_idle = False
        self._bad_blocks: set[int] = set()
        self._reported: Counter[str] = Counter()
        self._durations: list[tuple[float, float]] = []

    # --- start and end -----------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Register the engine's cache and begin to listen."""
        storages, places, num_blocks = cache_places(kv_caches)
        self._layers = {name: index for index, name in enumerate(kv_caches)}
        engine = TransferEngine(self._engine_options())
        cache = HostCache(engine, storages, places, num_blocks)
        identity = self._identity(kv_caches)
        role = self._settings.role
        if role in ("prefill", "both"):
            self._source = SourceService(engine, cache, identity, self._settings.key, self._settings.options)
        if role in ("decode", "both"):
            self._pull = PullService(engine, cache, identity, self._settings.options)
        self._engine = engine
        self._address = WorkerAddress(engine.address, dict(identity.fingerprint))

    def _engine_options(self) -> EngineOptions:
        parallel = self._config.parallel_config
        port = self._settings.options.listen_port
        return EngineOptions(
            listen=f"tcp://{self._settings.listen_host}:{port + parallel.rank if port else 0}",
            segment=f"{self._settings.instance}/{parallel.rank}",
            secret=self._settings.secret,
            transports=self._settings.options.transports or None,
        )

    def _identity(self, kv_caches: dict[str, torch.Tensor]) -> SourceIdentity:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        pp, tp = get_pp_group(), get_tp_group()
        coordinate = Coordinate(pp.rank_in_group, tp.rank_in_group, pp.world_size, tp.world_size)
        layout = block_layout(self._config, next(iter(kv_caches.values())))
        return SourceIdentity(self._settings.instance, fingerprint_of(self._config, layout), coordinate)

    @property
    def address(self) -> WorkerAddress | None:
        return self._address

    def close(self) -> None:
        """Stop moving bytes. Idempotent."""
        for service in (self._pull, self._source, self._engine):
            if service is not None:
                service.close()
        self._pull = self._source = self._engine = None

    # --- every step --------------------------------------------------------------------------------

    def begin_step(self, metadata: StepMetadata) -> None:
        """Before the forward: blocks that the engine took away are not vouched for any more."""
        self._is_idle = metadata.is_idle
        if self._source is not None:
            self._source.begin_step(metadata.step)

    def start_pulls(self, metadata: StepMetadata) -> None:
        """Start and cancel pulls; each is reported once by ``finished``."""
        if self._pull is not None:
            self._pull.start(metadata.step.pulls)
            self._pull.cancel(metadata.step.cancelled)

    def layer_computed(self, layer_name: str) -> None:
        if self._source is not None:
            self._source.layer_computed(self._layers[layer_name])

    def end_step(self) -> None:
        if self._source is not None:
            self._source.end_step()

    def finished(self) -> tuple[set[str], set[str]]:
        """Return the ids of requests whose blocks were pulled from here, and of those whose pull has ended."""
        sent = self._source.take_finished() if self._source is not None else set()
        received = self._results(may_wait=self._is_idle and not sent)
        for result in received:
            self._bad_blocks.update(result.bad_block_ids)
            self._durations.append((result.seconds, result.exposed_seconds))
        return sent, {result.request_id for result in received}

    def _results(self, *, may_wait: bool) -> list[PullResult]:
        if self._pull is None:
            return []
        results = self._pull.take_results()
        if not results and may_wait and self._pull.live_transfers:
            self._pull.wait_for_result(_IDLE_WAIT_S)
            results = self._pull.take_results()
        return results

    def take_bad_blocks(self) -> set[int]:
        """Return blocks whose load failed, each once; they were zeroed. Called right after ``finished``."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_counts(self) -> Counter[str]:
        """Return what was counted since the last call."""
        now: Counter[str] = Counter()
        for service in (self._source, self._pull):
            if service is not None:
                now.update(service.counters)
        fresh = now - self._reported
        self._reported = now
        return fresh

    def take_durations(self) -> list[tuple[float, float]]:
        """Return ``(seconds, exposed_seconds)`` of each pull that ended since the last call; see ``PullResult``."""
        durations, self._durations = self._durations, []
        return durations


def cache_places(kv_caches: dict[str, torch.Tensor]) -> tuple[list[UInt8Array], list[LayerPlace], int]:
    """Find each layer's blocks in memory.

    Args:
        kv_caches: By layer name: [blocks, ...], each block one contiguous run.

    Returns:
        The storages as uint8[bytes], one place a layer in them, and the number of blocks.

    Raises:
        ConfigError: The cache is not in host memory, or blocks are not contiguous.
    """
    storages: list[UInt8Array] = []
    by_pointer: dict[int, int] = {}
    places = []
    for name, tensor in kv_caches.items():
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            raise ConfigError(
                f"kv cache of {name}", getattr(tensor, "device", type(tensor)), "only host memory can be handed over"
            )
        if not tensor[0].is_contiguous():
            raise ConfigError(
                f"kv cache of {name}", tuple(tensor.stride()), "each block must be one contiguous run of bytes"
            )
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in by_pointer:
            by_pointer[storage.data_ptr()] = len(storages)
            storages.append(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
        size = tensor.element_size()
        places.append(
            LayerPlace(by_pointer[storage.data_ptr()], tensor.storage_offset() * size, tensor.stride(0) * size,
                       tensor[0].numel() * size)
        )  # fmt: skip
    counts = {tensor.shape[0] for tensor in kv_caches.values()}
    if len(counts) != 1:
        raise ConfigError("kv cache blocks", sorted(counts), "all layers need the same number of blocks")
    return storages, places, counts.pop()


def block_layout(config: VllmConfig, tensor: torch.Tensor) -> str:
    """Name how KV lies inside a block. On a CPU it depends on the attention kernel's instruction set."""
    from vllm.v1.attention.backends import cpu_attn

    cache = config.cache_config
    isa = cpu_attn._get_attn_isa(
        config.model_config.dtype, cache.block_size, config.model_config.get_head_size(), cache.cache_dtype
    )
    shape = "x".join(str(size) for size in tensor.shape[1:])
    return f"cpu-{isa}-{shape}-{str(tensor.dtype).removeprefix('torch.')}"
