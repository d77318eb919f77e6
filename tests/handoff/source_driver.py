"""Feeds a ``PrefillSource`` for its tests, and reads what it did."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mooncake_plugins.handoff import _messages as wire
from mooncake_plugins.handoff import _source as machine
from mooncake_plugins.handoff._source import PrefillSource

LAYERS = 3
LEASE_S = 60.0
EXPIRES_AT = 100.0
SCHEDULER, WORKER, OTHER = 1, 2, 3
PROMPT, TOKENS = b"prompt", 50
IDS = (40, 41, 42, 43)

Cell = tuple[int, int, int]


class Driver:
    """Feeds a ``PrefillSource`` and keeps what it did."""

    def __init__(self, layers: int = LAYERS) -> None:
        self.source = PrefillSource("t", layers, expires_at=EXPIRES_AT, lease_s=LEASE_S)
        self.now = 0.0
        self.actions: list[machine.SourceAction] = []

    def do(self, *events: machine.SourceEvent) -> list[machine.SourceAction]:
        """What these events make it do."""
        fresh = [action for event in events for action in self.source.handle(event, self.now)]
        self.actions += fresh
        return fresh

    def schedule(self, ids: Sequence[int] = IDS) -> list[machine.SourceAction]:
        return self.do(machine.Scheduled(PROMPT, TOKENS, tuple(ids)))

    def attach(self, link: int = WORKER, first_block: int = 0) -> list[machine.SourceAction]:
        return self.do(machine.Attached(link, PROMPT, TOKENS, first_block))

    def watch(self, link: int = SCHEDULER) -> list[machine.SourceAction]:
        return self.do(machine.Watched(link, PROMPT, TOKENS))

    def compute(self, blocks: int, layer0: int = 0, layer1: int = LAYERS) -> list[machine.SourceAction]:
        return self.do(machine.Computed(layer0, layer1, blocks))

    def tick(self, now: float) -> list[machine.SourceAction]:
        self.now = now
        return self.do(machine.Tick())

    def commit_all(self) -> list[machine.SourceAction]:
        """Fetch and hash everything that was announced."""
        done: list[machine.SourceAction] = []
        for message in readies(self.actions):
            hashes = self.do(machine.Fetched(WORKER, message.attempt, message.seq))
            done += [action for job in hashes for action in self.do(hashed(job))]
        return done


def readies(actions: Sequence[machine.SourceAction]) -> list[wire.Ready]:
    return [a.message for a in actions if isinstance(a, machine.Tell) and isinstance(a.message, wire.Ready)]


def cells(actions: Sequence[machine.SourceAction]) -> list[Cell]:
    """``(layer, place in the sequence, physical block)`` of everything that was announced, in order."""
    found = []
    for ready in readies(actions):
        for layer in range(ready.layer0, ready.layer1):
            found += [(layer, ready.block0 + i, block_id) for i, block_id in enumerate(ready.block_ids)]
    return found


def hashed(action: machine.SourceAction) -> machine.Hashed:
    assert isinstance(action, machine.HashSpan)
    count = (action.span.layer1 - action.span.layer0) * len(action.span.block_ids)
    return machine.Hashed(action.attempt, action.span.seq, np.arange(count, dtype=np.uint64))


def refusals(actions: Sequence[machine.SourceAction]) -> list[tuple[int, str]]:
    return [
        (a.link, a.message.reason)
        for a in actions
        if isinstance(a, machine.Tell) and isinstance(a.message, wire.Refused)
    ]


def withdrawals(actions: Sequence[machine.SourceAction]) -> list[tuple[int, str]]:
    tells = [a for a in actions if isinstance(a, machine.Tell)]
    return [(a.link, a.message.reason) for a in tells if isinstance(a.message, wire.Withdrawn)]


def frees(actions: Sequence[machine.SourceAction]) -> int:
    return sum(isinstance(action, machine.FreeBlocks) for action in actions)


def forgotten(actions: Sequence[machine.SourceAction]) -> list[str]:
    return [action.reason for action in actions if isinstance(action, machine.Forget)]


ALL = [(layer, place, IDS[place]) for layer in range(LAYERS) for place in range(len(IDS))]
