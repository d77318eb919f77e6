"""What an engine's scheduler tells its workers in a step. Plain values: they are pickled by the engine on their way."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """One request whose KV is handed off, computed for in this step.

    Attributes:
        transfer: The ticket's id.
        request_id: The engine's id.
        expires_in_s: Seconds until the ticket expires.
        prompt: ``prompt_digest`` of the whole prompt; ``tokens`` its length.
        block_ids: Blocks the request got in this step (at the beginning of an attempt: all).
        is_first: True at the beginning of an attempt.
        cached_blocks: With ``is_first``: leading blocks out of the prefix cache; counted only, see ``_source.py``.
        blocks_after: Blocks that are complete after the step (the last block counts once the prompt is).
    """

    transfer: str
    request_id: str
    expires_in_s: float
    prompt: bytes
    tokens: int
    block_ids: tuple[int, ...]
    is_first: bool
    cached_blocks: int
    blocks_after: int


@dataclass(frozen=True, slots=True)
class PullRequest:
    """One request whose KV a decode worker is to pull.

    Attributes:
        request_id: The engine's id.
        transfer: The ticket's id; ``ticket`` its text.
        addresses: P's workers by coordinate, out of the ticket.
        prompt: ``prompt_digest``; ``tokens`` the prompt's length.
        first_block: First block of the sequence that is wanted; ``block_ids`` are our blocks from there on.
    """

    request_id: str
    transfer: str
    ticket: str
    addresses: dict[str, str]
    prompt: bytes
    tokens: int
    first_block: int
    block_ids: tuple[int, ...]


@dataclass(slots=True)
class HandoffStep:
    """Everything the hand-off has to do in one engine step.

    Attributes:
        preempted: Transfers whose blocks the engine takes away now, before this step's forward.
        aborted: Transfers whose request ended without a complete prefill; their blocks are gone, too.
        work: Requests that this step computes for.
        held: ``(transfer, request_id)`` of requests whose blocks the engine now holds for the hand-off.
        pulls: Transfers to start.
        cancelled: Request ids whose pull is not needed any more; they are still reported.
    """

    preempted: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    work: list[PrefillWork] = field(default_factory=list)
    held: list[tuple[str, str]] = field(default_factory=list)
    pulls: list[PullRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PullResult:
    """How a pull ended. Nothing of it lands any more, and ``bad_block_ids`` (ours) were zeroed.

    Attributes:
        outcome: ``"ok"`` or why not.
        good_blocks: Blocks that arrived complete and verified.
        received_bytes: Bytes that were read, good or bad.
        seconds: From start to end.
        exposed_seconds: From prefill's last announcement to the end: what the transfer added to the prefill.
    """

    request_id: str
    outcome: str
    bad_block_ids: tuple[int, ...]
    good_blocks: int
    received_bytes: int
    seconds: float
    exposed_seconds: float
