"""A pair's answers equal a single engine's, token by token, and the KV really came from the prefill engine.

Equal tokens alone prove nothing, since every failure falls back to computing again. So each test also reads the decode
engine's counters: pulls that succeeded, blocks and bytes that arrived, nothing that failed. Each test draws its own
tokens, so that no prompt is in a prefix cache unless the test put it there.
"""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from tests.e2e.client import GREEDY, chat, complete, eventually, handoff_counts, is_idle, stream, streamed_tokens
from tests.e2e.fleets import Fleet

BLOCK = 32
# 4 layers x 2 (K and V) x 4 heads x 32 values x 4 bytes, for each token of a block.
BLOCK_BYTES = 4 * 2 * 4 * 32 * 4 * BLOCK
FAILURES = ("pulls_failed", "blocks_failed", "checksum_mismatches")


def random_tokens(count: int, seed: object) -> list[int]:
    draw = random.Random(str(seed))
    return [draw.randrange(3, 270) for _ in range(count)]


@dataclass
class Evidence:
    """What the decode engine counted between two moments."""

    fleet: Fleet
    before: Counter[str]
    counts: Counter[str] = field(default_factory=Counter)

    def settle(self, pulls: int) -> None:
        """Wait until that many pulls were counted, then take the difference."""

        def fresh() -> bool:
            self.counts = handoff_counts(self.fleet.decode)
            self.counts.subtract(self.before)
            return self.counts["pulls_ok"] + self.counts["pulls_failed"] >= pulls

        eventually(fresh, what=f"{pulls} pulls counted")


@contextmanager
def handed_over(fleet: Fleet, *, blocks: int, pulls: int = 1) -> Iterator[None]:
    """Assert that inside the block exactly this much KV came from the prefill engine, and that nothing failed."""
    evidence = Evidence(fleet, handoff_counts(fleet.decode))
    yield
    evidence.settle(pulls)
    counts = evidence.counts
    assert {name: counts[name] for name in FAILURES} == dict.fromkeys(FAILURES, 0)
    assert counts["pulls_ok"] == pulls
    assert counts["blocks_loaded"] == blocks
    assert counts["bytes_received"] == blocks * BLOCK_BYTES
    for url in (fleet.prefill, fleet.decode):
        eventually(partial(is_idle, url), what=f"{url} still holds blocks")


def blocks_of(tokens: int) -> int:
    return math.ceil(tokens / BLOCK)


@pytest.mark.parametrize("tokens", [2, 5, 31, 32, 33, 64, 96, 257, 1000, 1900])
def test_any_length_of_prompt_gives_the_tokens_of_a_single_engine(pair: Fleet, expect: Any, tokens: int) -> None:
    prompt = random_tokens(tokens, f"length {tokens}")
    with handed_over(pair, blocks=blocks_of(tokens)):
        answer = complete(pair.endpoint, prompt)
    assert answer.token_ids == expect(prompt)


def test_one_token_is_computed_by_decode_alone(pair: Fleet, expect: Any) -> None:
    before = handoff_counts(pair.decode)
    assert complete(pair.endpoint, [7]).token_ids == expect([7])
    eventually(lambda: handoff_counts(pair.decode)["computed_here_short"] > before["computed_here_short"])
    eventually(lambda: is_idle(pair.prefill), what="prefill was not told that nobody comes")


def test_shared_prefixes(pair: Fleet, expect: Any) -> None:
    """Both engines cache the common prefix after the first request; only the rest moves afterwards."""
    common = random_tokens(5 * BLOCK, "common")
    first, second = common + random_tokens(40, "first"), common + random_tokens(70, "second")
    with handed_over(pair, blocks=blocks_of(len(first))):
        assert complete(pair.endpoint, first).token_ids == expect(first)
    with handed_over(pair, blocks=blocks_of(len(second)) - 5):
        assert complete(pair.endpoint, second).token_ids == expect(second)


def test_prefix_cached_on_prefill_only(pair: Fleet, expect: Any) -> None:
    """Blocks out of prefill's cache never pass a layer hook, and are handed over all the same."""
    prompt = random_tokens(300, "cached on prefill")
    complete(pair.prefill, prompt, max_tokens=1)
    with handed_over(pair, blocks=blocks_of(300)):
        assert complete(pair.endpoint, prompt).token_ids == expect(prompt)


def test_prefix_cached_on_decode_only(pair: Fleet, expect: Any) -> None:
    """What decode has in its own cache is not moved."""
    prompt = random_tokens(300, "cached on decode")
    complete(pair.decode, prompt[: 6 * BLOCK], max_tokens=1)
    with handed_over(pair, blocks=blocks_of(300) - 6):
        assert complete(pair.endpoint, prompt).token_ids == expect(prompt)


def test_prefix_cached_on_both_to_different_depths(pair: Fleet, expect: Any) -> None:
    prompt = random_tokens(300, "cached on both")
    complete(pair.prefill, prompt[: 8 * BLOCK], max_tokens=1)
    complete(pair.decode, prompt[: 3 * BLOCK], max_tokens=1)
    with handed_over(pair, blocks=blocks_of(300) - 3):
        assert complete(pair.endpoint, prompt).token_ids == expect(prompt)


def test_sixteen_at_once_streamed_and_plain(pair: Fleet, expect: Any) -> None:
    prompts = [random_tokens(40 + 53 * i, f"concurrent {i}") for i in range(16)]
    answers: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        answers[i] = (
            streamed_tokens(pair.endpoint, prompts[i]) if i % 2 else complete(pair.endpoint, prompts[i]).token_ids[0]
        )

    with handed_over(pair, blocks=sum(blocks_of(len(p)) for p in prompts), pulls=16):
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert answers == {i: expect(prompt)[0] for i, prompt in enumerate(prompts)}


def test_streamed_and_plain_answers_are_the_same(pair: Fleet, expect: Any) -> None:
    prompt = random_tokens(100, "streamed")
    with handed_over(pair, blocks=blocks_of(100)):
        assert streamed_tokens(pair.endpoint, prompt) == expect(prompt)[0]


def test_chat_plain_and_streamed(pair: Fleet, reference: str) -> None:
    text = "the lazy dog jumps over the quick brown fox " * 6
    wanted = chat(reference, text)
    before = handoff_counts(pair.decode)
    assert chat(pair.endpoint, text).choices[0]["message"] == wanted.choices[0]["message"]
    body = {**GREEDY, "max_tokens": 16, "messages": [{"role": "user", "content": text}]}
    events = stream(pair.endpoint, "/v1/chat/completions", body)
    streamed = "".join(c["delta"].get("content") or "" for event in events for c in event["choices"])
    assert streamed == wanted.choices[0]["message"]["content"]
    eventually(lambda: handoff_counts(pair.decode)["pulls_ok"] >= before["pulls_ok"] + 1)
    assert handoff_counts(pair.decode)["pulls_failed"] == before["pulls_failed"]


def test_several_answers_to_one_prompt(pair: Fleet, reference: str) -> None:
    """With ``n > 1`` the prompt's KV moves once; the other answers find it in the prefix cache."""
    prompt = random_tokens(200, "n = 3")
    more = {"n": 3, "temperature": 0.9, "seed": 11}
    with handed_over(pair, blocks=blocks_of(200)):
        answer = complete(pair.endpoint, prompt, **more)
    assert answer.token_ids == complete(reference, prompt, **more).token_ids
    assert len({tuple(tokens) for tokens in answer.token_ids}) > 1


def test_stop_strings(pair: Fleet, reference: str) -> None:
    prompt = random_tokens(90, "stop")
    text = complete(reference, prompt, max_tokens=24).choices[0]["text"]
    stop = text[len(text) // 2 :][:3]
    wanted = complete(reference, prompt, max_tokens=24, stop=[stop])
    with handed_over(pair, blocks=blocks_of(90)):
        answer = complete(pair.endpoint, prompt, max_tokens=24, stop=[stop])
    assert answer.choices[0]["text"] == wanted.choices[0]["text"]
    assert answer.choices[0]["finish_reason"] == wanted.choices[0]["finish_reason"]


def test_logprobs_within_a_tolerance(pair: Fleet, reference: str) -> None:
    """Decode computes the last token of the prompt in a batch of its own; float32 sums may differ in the last bits."""
    prompt = random_tokens(150, "logprobs")
    with handed_over(pair, blocks=blocks_of(150)):
        ours = complete(pair.endpoint, prompt, logprobs=3).choices[0]
    theirs = complete(reference, prompt, logprobs=3).choices[0]
    assert ours["token_ids"] == theirs["token_ids"]
    assert ours["logprobs"]["token_logprobs"] == pytest.approx(theirs["logprobs"]["token_logprobs"], abs=1e-3)


def test_prompt_logprobs_are_complete(pair: Fleet, reference: str) -> None:
    """They need every token computed where they are answered, so nothing is handed over, and nothing is missing."""
    prompt = random_tokens(70, "prompt logprobs")
    before = handoff_counts(pair.decode)
    ours = complete(pair.endpoint, prompt, prompt_logprobs=0).choices[0]
    theirs = complete(reference, prompt, prompt_logprobs=0).choices[0]
    assert ours["token_ids"] == theirs["token_ids"]
    assert len(ours["prompt_logprobs"]) == 70
    assert [list(p or {}) for p in ours["prompt_logprobs"]] == [list(p or {}) for p in theirs["prompt_logprobs"]]
    assert handoff_counts(pair.decode)["pulls"] == before["pulls"]


def test_end_of_sequence_as_the_first_token(pair: Fleet, expect: Any) -> None:
    """Prefill ends its one token with a stop instead of a length; the KV is handed over all the same."""
    prompt = random_tokens(80, "eos")
    first = expect(prompt)[0][0]
    with handed_over(pair, blocks=blocks_of(80)):
        answer = complete(pair.endpoint, prompt, stop_token_ids=[first], ignore_eos=False)
    assert answer.choices[0]["finish_reason"] == "stop"


def test_text_prompts(pair: Fleet, expect: Any) -> None:
    text = "then the brown cat and the lazy fox " * 10
    before = handoff_counts(pair.decode)["pulls_ok"]
    assert complete(pair.endpoint, text).token_ids == expect(text)
    eventually(lambda: handoff_counts(pair.decode)["pulls_ok"] > before)
