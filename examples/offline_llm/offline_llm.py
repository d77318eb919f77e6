#!/usr/bin/env python3
"""Prefill and decode apart, offline: two `LLM` objects in two processes, and no server.

    offline_llm.py MODEL [--prompts 4] [--tokens 16]

The prefill engine computes the prompts; the decode engine reads their KVCache out of its memory, layer by layer while
it is being computed, and generates. What the Conductor does between servers, this program does itself: it asks the
prefill engine where it listens, makes one ticket for each prompt, and gives both engines the prompts at the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from mooncake_vllm import handoff_params, kv_transfer_config, new_ticket, read_description

from mooncake_plugins.handoff import EngineRole

START_TIMEOUT_S = 300
ANSWER_TIMEOUT_S = 120
TOPICS = ("the moon", "a cake", "two engines", "one cache", "slow networks", "fast memory", "long prompts", "the sea")


# --- in the process of an engine ----------------------------------------------------------------------------------


def run_engine(role: EngineRole, model: str, requests: Connection) -> None:
    """Make an `LLM` and answer what comes through the pipe until it is closed."""
    from vllm import LLM

    llm = LLM(
        model=model,
        kv_transfer_config=kv_transfer_config(role),  # the one line that is about us
        dtype="float32",  # so that tokens can be compared exactly
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=False,  # or there are no counters to read
    )
    try:
        requests.send("ready")
        while True:
            requests.send(answer(llm, requests.recv()))
    except EOFError:
        pass  # the main process has closed the pipe
    finally:
        # vLLM has processes of its own, and this one would wait for them at its end before anyone told them to end.
        llm.llm_engine.engine_core.shutdown()


def answer(llm: Any, job: Any) -> Any:
    """Generate for a batch of (prompt, max_tokens, kv_transfer_params); or read the counters, if that is the job."""
    from vllm import SamplingParams

    if job == "counters":
        return counters()
    prompts = [prompt for prompt, _, _ in job]
    sampling = [
        SamplingParams(
            temperature=0,
            ignore_eos=True,
            max_tokens=tokens,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        for _, tokens, params in job
    ]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [(list(output.outputs[0].token_ids), output.kv_transfer_params) for output in outputs]


def counters() -> dict[str, int]:
    """Read what the connector has counted in this engine."""
    from prometheus_client import REGISTRY

    metrics = (metric for metric in REGISTRY.collect() if metric.name == "mooncake_handoff_events")
    samples = (sample for metric in metrics for sample in metric.samples if sample.name.endswith("_total"))
    return {sample.labels["event"]: int(sample.value) for sample in samples}


# --- in the main process --------------------------------------------------------------------------------------------


class Engine:
    """An engine in a process of its own."""

    def __init__(self, role: EngineRole, model: str) -> None:
        # "spawn", because an engine's process must not inherit our threads and file descriptors.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run_engine, args=(role, model, theirs), name=role)
        self._process.start()
        theirs.close()

    def ask(self, job: Any) -> None:
        """Send a job and return at once."""
        self._pipe.send(job)

    def answer(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """Wait for the answer to the oldest job."""
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"the {self._process.name} engine did not answer within {timeout_s} s")
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the {self._process.name} engine has ended; its last words are above") from None

    def close(self) -> None:
        """End the process; vLLM's own processes end with it."""
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


@contextlib.contextmanager
def engines(model: str) -> Iterator[tuple[Engine, Engine]]:
    """Start both engines, side by side."""
    both = Engine("prefill", model), Engine("decode", model)
    try:
        for engine in both:
            engine.answer(START_TIMEOUT_S)
        yield both
    finally:
        for engine in both:
            engine.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder or name of a model")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="to generate for each prompt")
    given = parser.parse_args()
    prompts = [f"Tell me about {TOPICS[i % len(TOPICS)]}, number {i}. " * 8 for i in range(given.prompts)]

    with engines(given.model) as (prefill, decode):
        # Where does the prefill engine listen? A request with role "describe" is answered with that.
        prefill.ask([("?", 1, handoff_params("describe"))])
        ((_, described),) = prefill.answer()
        description = read_description(described)
        print(f"prefill engine {description.instance} listens on {description.addresses}")

        # One ticket for each prompt: it lets its holder read this prompt's KV from that engine, once.
        tickets = [new_ticket(description) for _ in prompts]
        legs = list(zip(prompts, tickets, strict=True))
        # Both engines get the batch at once. The prefill leg computes exactly one token.
        prefill.ask([(prompt, 1, handoff_params("prefill", ticket)) for prompt, ticket in legs])
        decode.ask([(prompt, given.tokens, handoff_params("decode", ticket)) for prompt, ticket in legs])
        handed_over = [tokens for tokens, _ in decode.answer()]
        prefill.answer()

        # The same prompts without tickets: an engine computes them alone.
        prefill.ask([(prompt, given.tokens, None) for prompt in prompts])
        alone = [tokens for tokens, _ in prefill.answer()]
        decode.ask("counters")
        counted = decode.answer()

    for prompt, ours, theirs in zip(prompts, handed_over, alone, strict=True):
        print(f"\n{prompt[:40]!r}...\n  decode: {ours}\n  alone:  {theirs}")
    print("\nThe decode engine counted:")
    for event in ("pulls_ok", "pulls_failed", "blocks_loaded", "bytes_received", "checksum_mismatches"):
        print(f"  {event:<20} {counted.get(event, 0):>10,}")
    is_equal = handed_over == alone and counted.get("pulls_ok") == len(prompts)
    print("\nAll tokens are equal, and every prompt's KV came from the prefill engine." if is_equal else "\nNOT EQUAL.")
    return 0 if is_equal else 1


if __name__ == "__main__":  # the engines' processes import this file, too
    raise SystemExit(main())
