"""The scheduler side of the connector.

Runs in the engine core's thread: nothing here waits, and nothing a client sends may raise.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.v1.request import RequestStatus

from mooncake_plugins.errors import TicketError
from mooncake_plugins.handoff import (
    DESCRIPTION_VERSION,
    HANDOFF_ROLE,
    PARAMS_KEY,
    EngineDescription,
    HandoffStep,
    PrefillWork,
    PullRequest,
    RequestParams,
    Ticket,
    TicketBook,
    ToDecode,
    WatchService,
    WatchState,
    verify_ticket,
)
from mooncake_plugins.kv import blocks_covering, prompt_digest
from mooncake_plugins.wire import Channel, Deadline, Identity, dial, new_incarnation
from mooncake_vllm._requests import DecodePhase, DecodeRequest, PrefillRequest, parent_of
from mooncake_vllm._settings import Settings

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from mooncake_vllm._worker import WorkerAddress

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 3.0
# Nothing is gained by pulling one token: the engine computes the last token of a prompt itself.
_LEAST_TOKENS = 2
_PREFILL_DONE = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass(slots=True)
class StepMetadata(KVConnectorMetadata):
    """What the scheduler side tells the workers in a step.

    Attributes:
        is_idle: The step computes nothing; the engine only waits.
    """

    step: HandoffStep = field(default_factory=HandoffStep)
    is_idle: bool = True


class SchedulerSide:
    """Decides for each request: hand its KV off, pull it, or leave it alone.

    Not thread-safe: the engine core's thread owns it.
    """

    def __init__(self, settings: Settings, block_size: int) -> None:
        self._settings, self._block_size = settings, block_size
        self._prefills: dict[str, PrefillRequest] = {}
        self._decodes: dict[str, DecodeRequest] = {}
        self._describes: set[str] = set()
        self._claims: dict[str, str] = {}
        self._books = {"prefill": TicketBook(), "decode": TicketBook()}
        self._step = HandoffStep()
        self._identity = Identity(f"scheduler-{settings.instance}"[:200], new_incarnation())
        self._watch: WatchService | None = None
        self._description: EngineDescription | None = None
        self.counters: Counter[str] = Counter()

    def set_workers(self, workers: dict[tuple[int, int], WorkerAddress]) -> None:
        """Take the addresses of the workers, by (pp, tp) rank; called once, before any request."""
        fingerprint = workers[min(workers)].fingerprint
        self._description = EngineDescription(
            version=DESCRIPTION_VERSION,
            instance=self._settings.instance,
            role=self._settings.role,
            addresses={f"{pp},{tp}": worker.address for (pp, tp), worker in workers.items()},
            fingerprint=fingerprint,
        )
        self._watch = WatchService(self._settings.instance, fingerprint, self._connect, self._settings.options)
        log.info("hand-off ready instance=%s role=%s addresses=%s", self._settings.instance, self._settings.role,
                 self._description.addresses)  # fmt: skip

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()

    def _connect(self, address: str) -> Channel:
        deadline = Deadline(_CONNECT_TIMEOUT_S)
        stream, agreed = dial(address, HANDOFF_ROLE, self._identity, self._settings.secret, deadline)
        return Channel(stream, agreed, ToDecode)

    # --- a request arrives -------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Read the request's hand-off fields. Whatever they hold, it is at worst computed as if they were absent."""
        raw = request.kv_transfer_params
        if not isinstance(raw, dict) or PARAMS_KEY not in raw:
            return
        try:
            params = msgspec.convert(raw[PARAMS_KEY], RequestParams)
            self._take(request, params)
        except msgspec.ValidationError as error:
            self._refuse(request, "malformed", str(error))
        except TicketError as error:
            self._refuse(request, error.reason, str(error))

    def _take(self, request: Request, params: RequestParams) -> None:
        if params.role == "describe":
            self._describes.add(request.request_id)
            return
        if self._settings.role not in (params.role, "both"):
            self._refuse(
                request, "role", f"asked for {params.role}, this instance was started as {self._settings.role}"
            )
            return
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            self._refuse(request, "embeds", "prompts given as embeddings cannot be handed over")
            return
        ticket = verify_ticket(params.ticket, self._settings.key, time.time())
        if params.role == "prefill":
            self._take_prefill(request, ticket)
        else:
            self._take_decode(request, ticket, params.ticket)

    def _take_prefill(self, request: Request, ticket: Ticket) -> None:
        if ticket.prefill != self._settings.instance:
            raise TicketError(
                "instance", f"it is for prefill instance {ticket.prefill}, this is {self._settings.instance}"
            )
        if request.max_tokens != 1:
            raise TicketError("max_tokens", "the prefill leg of a request computes exactly one token")
        self._books["prefill"].use(ticket, time.time())
        digest = _digest(request)
        self._prefills[request.request_id] = PrefillRequest(ticket, digest, request.num_prompt_tokens)
        self.counters["prefill_requests"] += 1

    def _take_decode(self, request: Request, ticket: Ticket, text: str) -> None:
        entry = DecodeRequest(ticket, text, b"", request.num_prompt_tokens)
        owner = self._claims.get(ticket.id)
        if owner is not None and parent_of(owner) == parent_of(request.request_id):
            entry.owner = owner
        else:
            self._books["decode"].use(ticket, time.time())
            self._claims[ticket.id] = request.request_id
            entry.prompt = _digest(request)
        self._decodes[request.request_id] = entry
        self.counters["decode_requests"] += 1

    def _refuse(self, request: Request, reason: str, detail: str) -> None:
        self.counters[f"tickets_refused_{reason}"] += 1
        log.warning("hand-off refused request=%s reason=%s: %s", request.request_id, reason, detail)

    # --- decode: what can be loaded ----------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Say how many tokens come from prefill; ``None``: ask again, no blocks are needed yet."""
        entry = self._decodes.get(request.request_id)
        if entry is None:
            return 0, False
        if request.skip_reading_prefix_cache:  # prompt logprobs: every token must be computed here
            self._compute_here(entry, "prompt_logprobs")
        if entry.owner:
            return (None, False) if self._owner_is_busy(entry) else (0, False)
        if entry.phase is DecodePhase.NEW:
            self._watch_for(entry)
        if entry.phase is not DecodePhase.ASKING:
            return 0, False
        return self._answer(entry, num_computed_tokens)

    def _owner_is_busy(self, entry: DecodeRequest) -> bool:
        owner = self._decodes.get(entry.owner)
        return owner is not None and owner.phase in (DecodePhase.NEW, DecodePhase.ASKING, DecodePhase.LOADING)

    def _watch_for(self, entry: DecodeRequest) -> None:
        if self._watch is None:
            self._compute_here(entry, "not_ready")
            return
        self._watch.watch(entry.ticket, entry.text, entry.prompt, entry.tokens)
        entry.phase = DecodePhase.ASKING

    def _answer(self, entry: DecodeRequest, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._watch is not None
        state = self._watch.state(entry.ticket.id)
        if state is WatchState.ASKING:
            return None, False
        if state is WatchState.DECLINED:
            session = self._watch.end(entry.ticket.id, release="declined")
            self._compute_here(entry, session.reason if session else "declined", session.detail if session else "")
            return 0, False
        tokens = entry.tokens - num_computed_tokens
        if tokens < _LEAST_TOKENS:
            self._compute_here(entry, "short")
            return 0, False
        return tokens, True

    def _compute_here(self, entry: DecodeRequest, reason: str, detail: str = "") -> None:
        if entry.phase is DecodePhase.LOCAL:
            return
        self._release(entry, reason)
        entry.phase = DecodePhase.LOCAL
        self.counters[f"computed_here_{reason}"] += 1
        if reason not in ("short", "prompt_logprobs"):
            log.warning("hand-off given up transfer=%s reason=%s: %s; computing here", entry.ticket.id, reason, detail)

    def _release(self, entry: DecodeRequest, reason: str) -> None:
        """Tell prefill that nobody will pull, so that it need not hold its blocks until its lease ends."""
        if entry.owner or self._watch is None or entry.phase not in (DecodePhase.NEW, DecodePhase.ASKING):
            return
        if entry.phase is DecodePhase.NEW:
            self._watch.watch(entry.ticket, entry.text, entry.prompt, entry.tokens)
        self._watch.end(entry.ticket.id, release=reason)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Blocks were allocated for what was promised: tell the workers to pull."""
        entry = self._decodes.get(request.request_id)
        if entry is None or num_external_tokens == 0 or entry.phase is not DecodePhase.ASKING:
            return
        first = (entry.tokens - num_external_tokens) // self._block_size
        ids = blocks.get_block_ids()[0][first : blocks_covering(entry.tokens, self._block_size)]
        self._step.pulls.append(
            PullRequest(request.request_id, entry.ticket.id, entry.text, dict(entry.ticket.addresses), entry.prompt,
                        entry.tokens, first, tuple(ids))
        )  # fmt: skip
        entry.phase = DecodePhase.LOADING
        self.counters["tokens_requested"] += num_external_tokens
        if self._watch is not None:
            self._watch.end(entry.ticket.id)

    def loads_finished(self, request_ids: set[str]) -> None:
        """The workers have reported these loads, good or bad."""
        for request_id in request_ids:
            entry = self._decodes.get(request_id)
            if entry is not None and entry.phase is DecodePhase.LOADING:
                entry.phase = DecodePhase.LOADED

    # --- every step --------------------------------------------------------------------------------

    def build_connector_meta(self, output: SchedulerOutput) -> StepMetadata:
        """Collect what the workers have to know of this step."""
        step, self._step = self._step, HandoffStep()
        for request_id in output.preempted_req_ids or ():
            prefill = self._prefills.get(request_id)
            if prefill is not None and prefill.is_started:
                prefill.is_started = prefill.is_complete = False
                step.preempted.append(prefill.ticket.id)
                self.counters["prefills_preempted"] += 1
        if self._prefills:
            self._collect_work(output, step)
        return StepMetadata(step, is_idle=output.total_num_scheduled_tokens == 0)

    def _collect_work(self, output: SchedulerOutput, step: HandoffStep) -> None:
        for new in output.scheduled_new_reqs:
            if new.req_id in self._prefills:
                self._add_work(step, output, new.req_id, new.block_ids[0], new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            if request_id in self._prefills:
                blocks = cached.new_block_ids[i]
                ids = blocks[0] if blocks is not None else []
                self._add_work(step, output, request_id, ids, cached.num_computed_tokens[i])

    def _add_work(
        self, step: HandoffStep, output: SchedulerOutput, request_id: str, block_ids: list[int], computed: int
    ) -> None:
        prefill = self._prefills[request_id]
        if prefill.is_complete:
            return
        after = computed + output.num_scheduled_tokens[request_id]
        prefill.is_complete = after >= prefill.tokens
        covered = blocks_covering(prefill.tokens, self._block_size)
        is_first, prefill.is_started = not prefill.is_started, True
        step.work.append(
            PrefillWork(
                transfer=prefill.ticket.id,
                request_id=request_id,
                expires_in_s=prefill.ticket.expires_at - time.time(),
                prompt=prefill.prompt,
                tokens=prefill.tokens,
                block_ids=tuple(block_ids),
                is_first=is_first,
                cached_blocks=computed // self._block_size if is_first else 0,
                blocks_after=covered if prefill.is_complete else after // self._block_size,
            )
        )

    # --- a request ends ----------------------------------------------------------------------------

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """Say whether the engine must keep the blocks (prefill not pulled yet), and what the answer carries."""
        request_id = request.request_id
        if request_id in self._describes:
            self._describes.discard(request_id)
            return False, self._described()
        if (prefill := self._prefills.pop(request_id, None)) is not None:
            return self._prefill_finished(request, prefill), None
        if (decode := self._decodes.pop(request_id, None)) is not None:
            self._decode_finished(request_id, decode)
        return False, None

    def _described(self) -> dict[str, Any] | None:
        if self._description is None:
            return None
        return {PARAMS_KEY: msgspec.to_builtins(self._description)}

    def _prefill_finished(self, request: Request, prefill: PrefillRequest) -> bool:
        if prefill.is_complete and request.status in _PREFILL_DONE:
            self._step.held.append((prefill.ticket.id, request.request_id))
            return True
        self._step.aborted.append(prefill.ticket.id)
        self.counters["prefills_aborted"] += 1
        return False

    def _decode_finished(self, request_id: str, entry: DecodeRequest) -> None:
        if self._claims.get(entry.ticket.id) == request_id:
            del self._claims[entry.ticket.id]
        self._release(entry, "aborted")
        if entry.phase is DecodePhase.LOADING:
            self._step.cancelled.append(request_id)


def _digest(request: Request) -> bytes:
    """Name the request's prompt by everything that changes its KV."""
    extras = [f"salt:{request.cache_salt}"] if request.cache_salt else []
    if request.lora_request is not None:
        extras.append(f"lora:{request.lora_request.lora_name}")
    extras += [f"mm:{feature.identifier}" for feature in request.mm_features or ()]
    return prompt_digest(request.prompt_token_ids or (), extras)
