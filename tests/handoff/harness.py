"""A prefill and a decode worker without engines: real Transfer Engines and services over numpy "caches"."""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from mooncake_plugins import testing
from mooncake_plugins.config import Secret
from mooncake_plugins.errors import PeerClosedError
from mooncake_plugins.handoff import (
    HANDOFF_ROLE,
    BlockCache,
    HandoffOptions,
    HandoffStep,
    HostCache,
    LayerPlace,
    PrefillWork,
    PullRequest,
    PullResult,
    PullService,
    SourceIdentity,
    SourceService,
    Ticket,
    ToDecode,
    WatchService,
    sign_ticket,
)
from mooncake_plugins.kv import CacheLayout, Coordinate
from mooncake_plugins.plugins import PluginRegistry, Provider, hookimpl
from mooncake_plugins.transfer import EngineOptions, TransferEngine
from mooncake_plugins.transports import Endpoint, SegmentDescription, TransportHost, Work
from mooncake_plugins.transports.loopback import LoopbackTransport
from mooncake_plugins.wire import Deadline

UInt8Array = npt.NDArray[np.uint8]
UInt64Array = npt.NDArray[np.uint64]

KEY = b"a secret of the tests' own cluster"
SECRET = Secret(KEY)
FINGERPRINT: dict[str, str | int] = {"model": "m", "dtype": "float32", "block_size": 16, "layers": 4}
LAYERS, BLOCKS, BLOCK_BYTES = 4, 64, 4096
BLOCK_TOKENS = 16
# How long anything may take that is not to fail. The runs that are expected to fail (``tests/mutants``) wait less.
PATIENCE_S = float(os.environ.get("MOONCAKE_TEST_PATIENCE_S", "20"))
RANK_0 = Coordinate()


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return as soon as the condition is true; fail when patience is over."""
    testing.wait_until(condition, what, PATIENCE_S)


def right_bytes(prompt: bytes, layer: int, place: int, size: int) -> UInt8Array:
    """What the KV of one block of a prompt is."""
    seed = xxhash.xxh3_64_intdigest(prompt + f"/{layer}/{place}".encode())
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


class Memory:
    """A worker's cache: two layers in one storage behind each other, the others padded in storages of their own."""

    def __init__(
        self, *, layers: int = LAYERS, blocks: int = BLOCKS, block_bytes: int = BLOCK_BYTES, pad: int = 0
    ) -> None:
        self.block_bytes, self.num_blocks = block_bytes, blocks
        stride = block_bytes + pad
        self.storages = [np.zeros(2 * blocks * stride, np.uint8)]
        self.places = [LayerPlace(0, 0, stride, block_bytes), LayerPlace(0, blocks * stride, stride, block_bytes)][
            :layers
        ]
        for layer in range(2, layers):
            self.storages.append(np.zeros(blocks * (stride + layer * 64), np.uint8))
            self.places.append(LayerPlace(layer - 1, 0, stride + layer * 64, block_bytes))

    def block(self, layer: int, block_id: int) -> UInt8Array:
        """A view of one block."""
        place = self.places[layer]
        start = place.offset + block_id * place.stride
        return self.storages[place.storage][start : start + place.block_bytes]

    def write(self, prompt: bytes, layer: int, ids: Sequence[int], first: int = 0) -> None:
        """Compute one layer of blocks: ``ids`` are the places from ``first`` on."""
        for place, block_id in enumerate(ids, first):
            self.block(layer, block_id)[:] = right_bytes(prompt, layer, place, self.block_bytes)

    def fill(self, ids: Iterable[int], value: int) -> None:
        """Use blocks for something else."""
        for block_id in ids:
            for layer in range(len(self.places)):
                self.block(layer, block_id)[:] = value

    def wrong(self, prompt: bytes, ids: Sequence[int], first: int = 0) -> list[tuple[int, int]]:
        """``(layer, place)`` of blocks that do not hold what they should."""
        return [
            (layer, place)
            for layer in range(len(self.places))
            for place, block_id in enumerate(ids, first)
            if not np.array_equal(self.block(layer, block_id), right_bytes(prompt, layer, place, self.block_bytes))
        ]

    def holds_only(self, ids: Iterable[int], value: int) -> bool:
        """Whether all layers of blocks are filled with one byte."""
        return all(
            (self.block(layer, block_id) == value).all() for block_id in ids for layer in range(len(self.places))
        )


class HookedCache:
    """A cache that tells a test before it hashes."""

    def __init__(self, inner: HostCache) -> None:
        self._inner = inner
        self.before_hash: Callable[[int, int, Sequence[int]], None] = lambda layer0, layer1, ids: None

    @property
    def layout(self) -> CacheLayout:
        return self._inner.layout

    def checksums(self, layer0: int, layer1: int, block_ids: Sequence[int], seeds: UInt64Array) -> UInt64Array:
        self.before_hash(layer0, layer1, block_ids)
        return self._inner.checksums(layer0, layer1, block_ids, seeds)

    def zero(self, block_ids: Sequence[int]) -> None:
        self._inner.zero(block_ids)


# --- a third party's transport that misbehaves on demand -------------------------------------------------------------


@dataclass(slots=True)
class Faults:
    """What happens around each read of the ``faulty`` transport; called in mover threads."""

    before: Callable[[Work], None] = lambda work: None
    after: Callable[[Work], None] = lambda work: None


FAULTS = Faults()


class FaultyEndpoint(Endpoint):
    """A loopback endpoint with calls around each read."""

    def __init__(self, inner: Endpoint) -> None:
        self._inner = inner
        self._is_interrupted = False

    def execute(self, work: Work) -> None:
        FAULTS.before(work)
        if self._is_interrupted:
            raise PeerClosedError("interrupted")
        self._inner.execute(work)
        FAULTS.after(work)

    def interrupt(self) -> None:
        self._is_interrupted = True
        self._inner.interrupt()

    @property
    def is_usable(self) -> bool:
        return self._inner.is_usable

    def close(self) -> None:
        self._inner.close()


class FaultyTransport(LoopbackTransport):
    """Loopback under another name."""

    name = "faulty"

    def connect(self, host: TransportHost, peer: SegmentDescription, deadline: Deadline) -> Endpoint:
        return FaultyEndpoint(super().connect(host, peer, deadline))


class FaultyPlugin:
    """Offers ``FaultyTransport``, as a third party would."""

    @staticmethod
    @hookimpl
    def mooncake_transports() -> list[Provider]:
        return [Provider("faulty", f"{__name__}:FaultyTransport")]


def faulty_registry() -> PluginRegistry:
    """The built-in plugins and ours."""
    registry = PluginRegistry()
    registry.load(disabled=("conductor", "vllm"))
    registry.register(FaultyPlugin(), "faults")
    return registry


def _engine(transport: str, secret: Secret | None) -> TransferEngine:
    registry = faulty_registry() if transport == "faulty" else None
    return TransferEngine(EngineOptions(transports=(transport,), secret=secret), registry=registry)


# --- the two sides ---------------------------------------------------------------------------------------------------


class PrefillSide:
    """A prefill worker; the test plays the engine."""

    def __init__(
        self,
        *,
        transport: str = "loopback",
        options: HandoffOptions | None = None,
        memory: Memory | None = None,
        fingerprint: dict[str, str | int] | None = None,
        coordinate: Coordinate = RANK_0,
        secret: Secret | None = SECRET,
    ) -> None:
        self.memory = memory or Memory()
        self.engine = _engine(transport, secret)
        self.cache = HookedCache(
            HostCache(self.engine, self.memory.storages, self.memory.places, self.memory.num_blocks)
        )
        self.instance = f"prefill-{uuid.uuid4().hex[:8]}"
        identity = SourceIdentity(self.instance, fingerprint or FINGERPRINT, coordinate)
        key = b"" if secret is None else secret.key
        self.service = SourceService(self.engine, self.cache, identity, key, options or HandoffOptions())
        self.freed: set[str] = set()

    def ticket(self, *, expires_in_s: float = 60.0) -> Ticket:
        """What the Conductor would make."""
        return Ticket(uuid.uuid4().hex, self.instance, {"0,0": self.engine.address}, time.time() + expires_in_s)

    def chunk(
        self, transfer: str, prompt: bytes, ids: Sequence[int], first: int, after: int, *, tokens: int = 0,
        is_first: bool | None = None, layers: Iterable[int] | None = None,
    ) -> None:  # fmt: skip
        """Run a step that computes blocks ``first..after`` of a request whose blocks are ``ids``."""
        self.begin(transfer, prompt, ids, first, after, tokens=tokens, is_first=is_first)
        for layer in layers if layers is not None else range(len(self.memory.places)):
            self.compute(prompt, layer, ids, first, after)
        self.service.end_step()

    def begin(
        self, transfer: str, prompt: bytes, ids: Sequence[int], first: int, after: int, *, tokens: int = 0,
        is_first: bool | None = None, preempted: Sequence[str] = (), aborted: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Begin that step."""
        new = tuple(ids) if (first == 0 if is_first is None else is_first) else ()
        work = PrefillWork(
            transfer, f"request-{transfer}", 60.0, prompt, tokens or len(ids) * BLOCK_TOKENS, new,
            first == 0 if is_first is None else is_first, 0, after,
        )  # fmt: skip
        self.service.begin_step(HandoffStep(preempted=list(preempted), aborted=list(aborted), work=[work]))

    def compute(self, prompt: bytes, layer: int, ids: Sequence[int], first: int, after: int) -> None:
        """Run one layer of it."""
        self.memory.write(prompt, layer, ids[first:after], first)
        self.service.layer_computed(layer)

    def prefill(self, transfer: str, prompt: bytes, ids: Sequence[int], *, tokens: int = 0, hold: bool = True) -> None:
        """Run a whole prompt in one step, and finish the request."""
        self.chunk(transfer, prompt, ids, 0, len(ids), tokens=tokens)
        if hold:
            self.hold(transfer)

    def hold(self, transfer: str) -> None:
        """The request is finished and its blocks are kept for the hand-off."""
        self.service.begin_step(HandoffStep(held=[(transfer, f"request-{transfer}")]))

    def preempt(self, *transfers: str) -> None:
        """The engine takes blocks away in a step of its own."""
        self.service.begin_step(HandoffStep(preempted=list(transfers)))

    def abort(self, *transfers: str) -> None:
        """The engine ends requests early."""
        self.service.begin_step(HandoffStep(aborted=list(transfers)))

    def is_freed(self, transfer: str) -> bool:
        """Whether the engine was told to free the blocks."""
        self.freed |= self.service.take_finished()
        return f"request-{transfer}" in self.freed

    def wait_freed(self, transfer: str) -> None:
        wait_until(lambda: self.is_freed(transfer), "the blocks to be freed")

    def wait_quiet(self) -> None:
        """Until nothing is left of any transfer."""
        wait_until(lambda: self.service.live_transfers == 0, "the prefill side to forget all transfers")

    def close(self) -> None:
        self.service.close()
        self.engine.close()


class DecodeSide:
    """A decode worker and its scheduler's watcher; the test plays the engine."""

    def __init__(
        self,
        *,
        transport: str = "loopback",
        options: HandoffOptions | None = None,
        memory: Memory | None = None,
        fingerprint: dict[str, str | int] | None = None,
        coordinate: Coordinate = RANK_0,
        secret: Secret | None = SECRET,
    ) -> None:
        self.memory = memory or Memory(pad=192)
        self.engine = _engine(transport, secret)
        self.cache = HookedCache(
            HostCache(self.engine, self.memory.storages, self.memory.places, self.memory.num_blocks)
        )
        identity = SourceIdentity("decode", fingerprint or FINGERPRINT, coordinate)
        self.options = options or HandoffOptions()
        self.service = PullService(self.engine, self.cache, identity, self.options)
        self.watcher = WatchService("decode", identity.fingerprint, self._connect, self.options)
        self._results: dict[str, PullResult] = {}
        self._numbers = itertools.count(1)

    def _connect(self, address: str) -> Any:
        return self.engine.connect(address, HANDOFF_ROLE, message_type=ToDecode, timeout_s=3.0)

    def pull(
        self, ticket: Ticket, prompt: bytes, ids: Sequence[int], *, first: int = 0, tokens: int = 0,
        text: str | None = None,
    ) -> str:  # fmt: skip
        """Begin to pull a prompt's blocks from ``first`` on into ``ids``; returns the request id."""
        request_id = f"pull-{next(self._numbers)}"
        tokens = tokens or (first + len(ids)) * BLOCK_TOKENS
        signed = sign_ticket(ticket, KEY) if text is None else text
        self.service.start(
            [PullRequest(request_id, ticket.id, signed, dict(ticket.addresses), prompt, tokens, first, tuple(ids))]
        )
        return request_id

    def result(self, request_id: str, *, timeout_s: float = PATIENCE_S) -> PullResult:
        """Wait for a pull's one result."""
        until = time.monotonic() + timeout_s
        while request_id not in self._results:
            assert time.monotonic() < until, f"{request_id} has not been reported in {timeout_s} s"
            self.service.wait_for_result(0.05)
            self._take()
        return self._results[request_id]

    def has_result(self, request_id: str) -> bool:
        self._take()
        return request_id in self._results

    def _take(self) -> None:
        for result in self.service.take_results():
            assert result.request_id not in self._results, "a pull was reported twice"
            self._results[result.request_id] = result

    def close(self) -> None:
        self.watcher.close()
        self.service.close()
        self.engine.close()


def as_cache(cache: HookedCache) -> BlockCache:
    """Let the type checker see that it is one."""
    return cache
