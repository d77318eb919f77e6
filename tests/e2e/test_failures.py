"""What goes wrong between two real engines, and what then happens: the right tokens or a refusal, in time.

Afterwards every block is free again.

All tests share one pair; each leaves it as it found it. The last ones kill engines.
"""

from __future__ import annotations

import http.client
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.client import GREEDY, Answer, complete, eventually, handoff_counts, is_idle, open_and_send
from tests.e2e.fleets import FaultyFleet
from tests.e2e.test_equality import BLOCK, BLOCK_BYTES, random_tokens


class Asking:
    """A request in a thread of its own."""

    def __init__(self, ask: Callable[[], Answer]) -> None:
        self._answer: Answer | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(ask,))
        self._thread.start()

    def _run(self, ask: Callable[[], Answer]) -> None:
        try:
            self._answer = ask()
        except (OSError, http.client.HTTPException) as error:
            self._error = error

    def answer(self, timeout_s: float = 60.0) -> Answer:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the request hangs"
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer


def fresh_counts(fleet: FaultyFleet, before: Counter[str], name: str, at_least: int = 1) -> Counter[str]:
    """Wait until the decode engine has counted ``name``; returns everything counted since ``before``."""

    def difference() -> Counter[str]:
        now = handoff_counts(fleet.url("decode"))
        now.subtract(before)
        return now

    eventually(lambda: difference()[name] >= at_least, what=f"decode counts {name}")
    return difference()


# --- controls: the counters and the checks are real ------------------------------------------------


def test_both_roles_hand_over(faulty: FaultyFleet, expect: Any) -> None:
    prompt = random_tokens(500, "both roles")
    before = handoff_counts(faulty.url("decode"))
    assert complete(faulty.endpoint, prompt).token_ids == expect(prompt)
    counts = fresh_counts(faulty, before, "pulls_ok")
    assert counts["blocks_loaded"] == math.ceil(500 / BLOCK)
    assert counts["bytes_received"] == math.ceil(500 / BLOCK) * BLOCK_BYTES


def test_a_flipped_bit_is_counted_and_computed_again(faulty: FaultyFleet, expect: Any) -> None:
    prompt = random_tokens(500, "flipped bit")
    before = handoff_counts(faulty.url("decode"))
    faulty.faults.set("flip")
    answer = complete(faulty.endpoint, prompt)
    assert answer.token_ids == expect(prompt)
    counts = fresh_counts(faulty, before, "pulls_failed")
    assert counts["checksum_mismatches"] == 1
    assert counts["blocks_failed"] >= 1
    faulty.wait_until_idle("prefill", "decode")


def test_after_a_failed_load_later_requests_are_healthy(faulty: FaultyFleet, expect: Any) -> None:
    """A recycled block that still held wrong bytes (NaN, say) would poison whoever gets it next."""
    faulty.faults.set("flip")
    complete(faulty.endpoint, random_tokens(700, "poison"))
    for i in range(4):
        prompt = random_tokens(300 + 17 * i, f"after poison {i}")
        assert complete(faulty.url("decode"), prompt).token_ids == expect(prompt)


def test_a_conductor_with_another_secret_gets_right_answers_but_no_transfer(
    faulty: FaultyFleet, expect: Any, tmp_path: Path
) -> None:
    """Both engines refuse its tickets by name; decode computes alone."""
    secret = tmp_path / "secret"
    secret.write_text("the secret of another cluster")
    secret.chmod(0o600)
    before = {name: handoff_counts(faulty.url(name)) for name in ("prefill", "decode")}
    prompt = random_tokens(200, "wrong secret")
    with faulty.another_conductor(secret) as endpoint:
        assert complete(endpoint, prompt).token_ids == expect(prompt)
    for name, counts in before.items():
        eventually(partial(_is_refused_once, faulty, name, counts), what=f"{name} refuses the ticket")
        assert _fresh(faulty, name, counts, "pulls") == 0


def _is_refused_once(faulty: FaultyFleet, name: str, before: Counter[str]) -> bool:
    return _fresh(faulty, name, before, "tickets_refused_forged") == 1


def _fresh(faulty: FaultyFleet, name: str, before: Counter[str], event: str) -> int:
    return handoff_counts(faulty.url(name))[event] - before[event]


# --- clients that leave ----------------------------------------------------------------------------


def _request(prompt: list[int], **more: Any) -> dict[str, Any]:
    return {**GREEDY, "prompt": prompt, "max_tokens": 64, **more}


def test_client_gone_while_prefill_has_not_begun(faulty: FaultyFleet) -> None:
    before = handoff_counts(faulty.url("decode"))["decode_requests"]
    prefill = faulty.processes["prefill"]
    prefill.signal_group(signal.SIGSTOP)
    try:
        sock = open_and_send(faulty.endpoint, "/v1/completions", _request(random_tokens(400, "gone early")))
        eventually(lambda: handoff_counts(faulty.url("decode"))["decode_requests"] > before or _is_waiting(faulty))
        sock.close()
    finally:
        prefill.signal_group(signal.SIGCONT)
    faulty.wait_until_idle("prefill", "decode")


def _is_waiting(fleet: FaultyFleet) -> bool:
    return not is_idle(fleet.url("decode"))


def test_client_gone_while_kv_is_being_pulled(faulty: FaultyFleet) -> None:
    faulty.faults.set("gate")
    sock = open_and_send(faulty.endpoint, "/v1/completions", _request(random_tokens(600, "gone at the gate")))
    faulty.faults.wait_at_gate()
    sock.close()
    faulty.faults.open_gate()
    faulty.wait_until_idle("prefill", "decode")


def test_client_gone_while_tokens_come(faulty: FaultyFleet) -> None:
    body = _request(random_tokens(200, "gone late"), max_tokens=1500, stream=True)
    sock = open_and_send(faulty.endpoint, "/v1/completions", body)
    assert sock.recv(4096)
    sock.close()
    faulty.wait_until_idle("prefill", "decode", timeout_s=20.0)


# --- parts that stop or die ------------------------------------------------------------------------


def test_prefill_stopped_mid_transfer_changes_no_byte_when_it_resumes(faulty: FaultyFleet, expect: Any) -> None:
    """Decode gives up, computes, and uses its blocks for others; then prefill goes on where it stood."""
    prompt = random_tokens(800, "stopped prefill")
    others = [random_tokens(500, f"meanwhile {i}") for i in range(3)]
    wanted = [expect(other) for other in others]
    before = handoff_counts(faulty.url("decode"))
    prefill = faulty.processes["prefill"]
    faulty.faults.set("gate")
    asking = Asking(lambda: complete(faulty.endpoint, prompt))
    faulty.faults.wait_at_gate()
    prefill.signal_group(signal.SIGSTOP)
    try:
        faulty.faults.open_gate()
        assert asking.answer().token_ids == expect(prompt)
        counts = fresh_counts(faulty, before, "pulls_failed")
        assert counts["pulls_ok"] == 0
        assert [complete(faulty.url("decode"), other).token_ids for other in others] == wanted
    finally:
        prefill.signal_group(signal.SIGCONT)
    # The same prompts again, now out of decode's prefix cache: had a late byte landed, tokens would differ.
    assert [complete(faulty.url("decode"), other).token_ids for other in others] == wanted
    assert complete(faulty.url("decode"), prompt).token_ids == expect(prompt)
    faulty.wait_until_idle("prefill", "decode")


def test_conductor_killed_mid_transfer_leaves_both_engines_free(faulty: FaultyFleet, expect: Any) -> None:
    faulty.faults.set("gate")
    asking = Asking(lambda: complete(faulty.endpoint, random_tokens(600, "killed conductor")))
    faulty.faults.wait_at_gate()
    faulty.processes["conductor"].kill()
    faulty.faults.open_gate()
    with pytest.raises(OSError):
        asking.answer()
    faulty.wait_until_idle("prefill", "decode")
    faulty.start_conductor()
    prompt = random_tokens(64, "new conductor")
    assert complete(faulty.endpoint, prompt).token_ids == expect(prompt)


def test_decode_killed_mid_transfer_is_refused_and_prefill_is_free_before_its_lease_ends(faulty: FaultyFleet) -> None:
    faulty.faults.set("gate")
    asking = Asking(lambda: complete(faulty.endpoint, random_tokens(600, "killed decode")))
    faulty.faults.wait_at_gate()
    faulty.processes["decode"].kill()
    answer = asking.answer()
    assert answer.status in (502, 503) and "error" in answer.body
    faulty.wait_until_idle("prefill", timeout_s=10.0)
    faulty.faults.open_gate()


def test_without_checks_wrong_bytes_change_the_tokens(faulty: FaultyFleet, expect: Any) -> None:
    """The control of all other tests: the pulled bytes are what decode computes with, and only the checks guard them.

    Runs on the decode engine that replaces the killed one, which the Conductor takes back by itself.
    """
    faulty.start_engines("decode", decode_options={"MOONCAKE_HANDOFF_VERIFY": "false"})
    faulty.wait_for_engines("decode")
    eventually(lambda: complete(faulty.endpoint, [5, 6, 7]).status == 200, what="decode is taken back")
    eventually(partial(_hands_over, faulty), what="the Conductor pairs the new decode engine")
    prompt = random_tokens(500, "zeros")
    before = handoff_counts(faulty.url("decode"))
    faulty.faults.set("zero")
    answer = complete(faulty.endpoint, prompt)
    faulty.faults.set("pass")
    counts = fresh_counts(faulty, before, "pulls_ok")
    assert counts["checksum_mismatches"] == counts["pulls_failed"] == 0
    assert answer.token_ids != expect(prompt)


def _hands_over(faulty: FaultyFleet) -> bool:
    """Ask for a prompt that nobody has; tell whether decode has pulled one by now."""
    assert complete(faulty.endpoint, random_tokens(40, time.monotonic())).status == 200
    return handoff_counts(faulty.url("decode"))["pulls_ok"] > 0


def test_prefill_killed_mid_transfer_is_answered_rightly(faulty: FaultyFleet, expect: Any) -> None:
    prompt = random_tokens(800, "killed prefill")
    faulty.faults.set("gate")
    asking = Asking(lambda: complete(faulty.endpoint, prompt))
    faulty.faults.wait_at_gate()
    faulty.processes["prefill"].kill()
    faulty.faults.open_gate()
    begun = time.monotonic()
    assert asking.answer().token_ids == expect(prompt)
    assert time.monotonic() - begun < 30.0
    faulty.wait_until_idle("decode")
    # Without any prefill instance, decode serves alone.
    assert complete(faulty.endpoint, prompt).token_ids == expect(prompt)
