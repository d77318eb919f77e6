"""Engines with too little cache: requests lose their blocks on either side during a hand-off; the tokens stay right."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.e2e.client import complete, eventually, gauge, handoff_counts
from tests.e2e.fleets import FaultyFleet
from tests.e2e.test_equality import random_tokens

PREEMPTIONS = "vllm:num_preemptions_total"


@contextmanager
def crowd(url: str, at_once: int) -> Iterator[None]:
    """Keep an engine busy with plain requests of mixed lengths, whose caches grow."""
    is_over = threading.Event()

    def ask(i: int) -> None:
        for turn in itertools.count():
            if is_over.is_set():
                return
            complete(url, random_tokens(650 + 41 * i, f"crowd {i} {turn}"), max_tokens=400)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(at_once)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join(120)


def test_prefill_loses_its_blocks_in_the_middle(faulty: FaultyFleet, expect: Any) -> None:
    """Plain requests on the prefill engine take the blocks of prefills that are being announced; those begin again.

    A cache of 256 blocks, seven requests that grow to 33 to 41 each, and prompts of 57 in 20 steps and more: whenever
    the crowd has left just enough room for a prompt to begin, it soon takes it back.
    """
    url = faulty.url("prefill")
    before = handoff_counts(url)["prefills_preempted"]
    answers: list[tuple[list[int], list[list[int]]]] = []
    deadline = time.monotonic() + 100.0
    with crowd(url, at_once=7):
        while handoff_counts(url)["prefills_preempted"] == before and time.monotonic() < deadline:
            prompt = random_tokens(1800, f"preempted prefill {len(answers)}")
            answers.append((prompt, complete(faulty.endpoint, prompt, max_tokens=2).token_ids))
    assert handoff_counts(url)["prefills_preempted"] > before, (
        f"none of {len(answers)} was preempted: nothing is proved"
    )
    assert [tokens for _, tokens in answers] == [expect(prompt, max_tokens=2) for prompt, _ in answers]
    faulty.wait_until_idle("prefill", "decode")


def test_decode_preempts_while_others_are_pulled(faulty: FaultyFleet, expect: Any) -> None:
    """A request that was pulled and later preempted is computed again by decode alone: its ticket is used up."""
    url = faulty.url("decode")
    preempted, pulled = gauge(url, PREEMPTIONS), handoff_counts(url)["pulls_ok"]
    prompts = [random_tokens(600, f"crowded decode {i}") for i in range(8)]
    answers: dict[int, list[list[int]]] = {}

    def ask(i: int) -> None:
        answers[i] = complete(faulty.endpoint, prompts[i], max_tokens=700).token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert gauge(url, PREEMPTIONS) > preempted, "nothing was preempted: the test proves nothing"
    assert answers == {i: expect(prompt, max_tokens=700) for i, prompt in enumerate(prompts)}
    eventually(lambda: handoff_counts(url)["pulls_ok"] == pulled + len(prompts))
    faulty.wait_until_idle("prefill", "decode")
