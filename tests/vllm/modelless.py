"""Engines without a model: vLLM's own scheduler and configuration, our whole connector, and arithmetic as the forward.

The "KV" of a token is a 64-bit number that depends on every token before it, a different one in each layer. The "next
token" depends on the KV of all tokens, read out of the cache through the block table. So one wrong, stale or misplaced
block changes what comes out, as with a model, and a scenario takes milliseconds.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from mooncake_plugins.handoff import PARAMS_KEY, Ticket, sign_ticket

BLOCK = 32
LAYERS = 3
VOCABULARY = 280
TIMEOUT_S = 20.0

UInt64Array = npt.NDArray[np.uint64]

init_none_hash(sha256)
_numbers = itertools.count()


def engine_config(model: Path, role: str = "kv_both", **options: Any) -> VllmConfig:
    """Make a real configuration of an engine with the connector; ``extra`` is the connector's extra configuration."""
    transfer = {
        "kv_connector": "mooncake",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": options.pop("extra", {}),
    }
    given = {
        "model": str(model), "dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "block_size": BLOCK,
        "max_num_batched_tokens": 64, "max_num_seqs": 8, "enable_chunked_prefill": True, "kv_transfer_config": transfer,
    }  # fmt: skip
    return EngineArgs(**{**given, **options}).create_engine_config()


def token_kv(tokens: Sequence[int], layer: int) -> UInt64Array:
    """Return uint64[len(tokens)]: each depends on all tokens up to it."""
    values, value = [], 0x9E37 + layer
    for token in tokens:
        value = (value * 6364136223846793005 + 2 * token + 1) % (1 << 64)
        values.append(value ^ value >> 29)
    return np.asarray(values, np.uint64)


def next_token(layers: Sequence[UInt64Array]) -> int:
    """Return what the "model" says after the tokens with this KV: uint64[tokens], one array a layer."""
    places = np.arange(1, len(layers[0]) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    total = sum(int((kv * (places ^ np.uint64(layer))).sum()) for layer, kv in enumerate(layers))
    return 3 + (total ^ total >> 31) % VOCABULARY


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """Return what an engine answers that computes everything itself."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token([token_kv(tokens, layer) for layer in range(LAYERS)]))
    return tokens[len(prompt) :]


class ModellessEngine:
    """Scheduler and worker of one engine in this process; ``step`` does what the engine core's loop does once.

    Attributes:
        outputs: Token ids of every request, by request id; complete when ``is_finished``.
        answers: ``kv_transfer_params`` of finished requests that had some.
        steps: Scheduler outputs so far that computed something.
        counts: What the connector has counted, by event, as it goes to ``/metrics``.
        durations: ``(seconds, exposed seconds)`` of each pull.
        faults: Called before results are taken, for tests that break things.
    """

    def __init__(self, config: VllmConfig, blocks: int) -> None:
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        names = [f"layers.{i}.attn" for i in range(LAYERS)]
        cache_config = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)]
        )
        self.scheduler = Scheduler(
            config, cache_config, StructuredOutputManager(config), block_size=BLOCK, log_stats=True
        )
        self.worker: Any = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, cache_config)
        # Layers are views of one storage, as vLLM allocates them on a CPU. What is stale must not look right: not zero.
        self.storage = torch.full((LAYERS, blocks, 1, BLOCK, 2), float("nan"))
        self.worker.register_kv_caches(dict(zip(names, self.storage, strict=True)))
        self.cache: UInt64Array = self.storage.numpy().view(np.uint64).reshape(LAYERS, blocks, BLOCK)
        self._names = names
        connector: Any = self.scheduler.connector
        connector.set_xfer_handshake_metadata_pp_aware({(0, 0): self.worker.get_handshake_metadata()})
        self.connector = connector
        self.side = connector._scheduler
        self.blocks = self.free_blocks
        self.outputs: dict[str, list[int]] = {}
        self.answers: dict[str, Any] = {}
        self.steps: list[SchedulerOutput] = []
        self.counts: Counter[str] = Counter()
        self.durations: list[tuple[float, float]] = []
        self.faults: Callable[[], None] = lambda: None

    # --- requests --------------------------------------------------------------------------------------------------

    @property
    def instance(self) -> str:
        return str(self.side._settings.instance)

    @property
    def addresses(self) -> dict[str, str]:
        return {"0,0": self.worker.get_handshake_metadata().address}

    def ticket(self, **changes: Any) -> Ticket:
        """Return a fresh ticket for pulling from this engine."""
        facts = {
            "id": uuid.uuid4().hex,
            "prefill": self.instance,
            "addresses": self.addresses,
            "expires_at": time.time() + 60,
        }
        return Ticket(**{**facts, **changes})

    def add(self, prompt: Sequence[int], params: Any = None, *, request_id: str = "", **sampling: Any) -> Request:
        """Send a request, with whatever ``kv_transfer_params``."""
        options = {"max_tokens": 4, "ignore_eos": True, "temperature": 0.0, **sampling}
        extra = None if params is None else {"kv_transfer_params": params}
        request = Request(
            request_id or f"request-{next(_numbers)}", list(prompt), SamplingParams(**options, extra_args=extra), None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )  # fmt: skip
        self.outputs[request.request_id] = []
        self.scheduler.add_request(request)
        return request

    def abort(self, request: Request) -> None:
        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def preempt_all(self) -> None:
        """Take the blocks of all running requests away, as the scheduler does when it runs out of them."""
        scheduler = self.scheduler
        while scheduler.running:
            scheduler._preempt_request(scheduler.running.pop(), time.monotonic())
        scheduler.prev_step_scheduled_req_ids.clear()

    @property
    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def is_idle(self) -> bool:
        """True if nothing is left of any request, held blocks included."""
        return not self.scheduler.requests and self.free_blocks == self.blocks

    # --- a step ----------------------------------------------------------------------------------------------------

    def step(self) -> SchedulerOutput:
        """Schedule, "compute", move KV, and tell the scheduler."""
        output = self.scheduler.schedule()
        worker = self.worker
        worker.handle_preemptions(output.kv_connector_metadata)
        worker.bind_connector_metadata(output.kv_connector_metadata)
        sampled = self._forward(output)
        worker.start_load_kv(None)
        worker.wait_for_save()
        self.faults()
        sending, receiving = worker.get_finished(output.finished_req_ids)
        moved = KVConnectorOutput(
            finished_sending=sending,
            finished_recving=receiving,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_stats=worker.get_kv_connector_stats(),
        )
        worker.clear_connector_metadata()
        self._update(output, sampled, moved)
        if output.total_num_scheduled_tokens:
            self.steps.append(output)
        return output

    def _forward(self, output: SchedulerOutput) -> dict[str, list[int]]:
        """Write the KV of the step's tokens layer by layer; return what was sampled for complete requests."""
        rows = {request_id: self._row(request_id) for request_id in output.num_scheduled_tokens}
        for layer, name in enumerate(self._names):
            for request_id, (tokens, blocks, after) in rows.items():
                before = after - output.num_scheduled_tokens[request_id]
                places = np.arange(before, after)
                self.cache[layer, blocks[places // BLOCK], places % BLOCK] = token_kv(tokens[:after], layer)[before:]
            if rows:
                self.worker.save_kv_layer(name, self.storage[layer], None)
        return {request_id: self._sample(*row) for request_id, row in rows.items()}

    def _row(self, request_id: str) -> tuple[list[int], npt.NDArray[np.int64], int]:
        request = self.scheduler.requests[request_id]
        blocks = np.asarray(self.scheduler.kv_cache_manager.get_block_ids(request_id)[0], np.int64)
        return list(request.all_token_ids), blocks, request.num_computed_tokens

    def _sample(self, tokens: list[int], blocks: npt.NDArray[np.int64], after: int) -> list[int]:
        if after < len(tokens):
            return []
        places = np.arange(after)
        return [next_token([self.cache[layer, blocks[places // BLOCK], places % BLOCK] for layer in range(LAYERS)])]

    def _update(self, output: SchedulerOutput, sampled: dict[str, list[int]], moved: KVConnectorOutput) -> None:
        ids = list(sampled)
        runner = ModelRunnerOutput(ids, {one: i for i, one in enumerate(ids)}, list(sampled.values()))
        runner.kv_connector_output = moved
        for outputs in self.scheduler.update_from_output(output, runner).values():
            for one in outputs.outputs:
                self.outputs[one.request_id] += one.new_token_ids
                if one.kv_transfer_params is not None:
                    self.answers[one.request_id] = one.kv_transfer_params
            if outputs.scheduler_stats is not None and (stats := outputs.scheduler_stats.kv_connector_stats):
                self.counts.update(stats["counts"])
                self.durations += stats["durations"]

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()


class Pair:
    """A prefill and a decode engine, stepped in turn."""

    def __init__(self, prefill: ModellessEngine, decode: ModellessEngine) -> None:
        self.prefill, self.decode = prefill, decode

    def add(self, prompt: Sequence[int], *, ticket: Ticket | None = None, **sampling: Any) -> tuple[Request, Request]:
        """Send both legs of a request."""
        text = sign_ticket(ticket or self.prefill.ticket(), b"")
        first = self.prefill.add(prompt, params("prefill", text), max_tokens=1)
        return first, self.decode.add(prompt, params("decode", text), **sampling)

    def run(self, is_done: Callable[[], bool] | None = None) -> None:
        """Step both until ``is_done`` (default: nothing is left of any request)."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (is_done() if is_done else self.prefill.is_idle and self.decode.is_idle):
            assert time.monotonic() < deadline, f"not done within {TIMEOUT_S} s: {self.decode.scheduler.requests}"
            ran = self.prefill.step().total_num_scheduled_tokens + self.decode.step().total_num_scheduled_tokens
            if not ran:
                time.sleep(0.0005)


def params(role: str, ticket: str = "") -> dict[str, Any]:
    """Return ``kv_transfer_params`` as the Conductor makes them."""
    return {PARAMS_KEY: {"role": role, "ticket": ticket}}
