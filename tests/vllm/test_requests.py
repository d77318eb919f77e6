"""What clients write in ``kv_transfer_params``: it never breaks the engine, is counted, and at most costs computing."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mooncake_vllm._requests import parent_of

from mooncake_plugins.handoff import sign_ticket
from tests.vllm.modelless import ModellessEngine, expected_tokens, params

PROMPT = [11, 12, 13, 14, 15]
NESTED: Any = {}
for _ in range(50):
    NESTED = {"mooncake": NESTED}

IGNORED: list[Any] = [
    None, {}, {"other": 1}, {"Mooncake": {"role": "decode"}}, {"do_remote_prefill": True}, {"do_remote_decode": True},
]  # fmt: skip
MALFORMED: list[Any] = [
    {"mooncake": value}
    for value in (
        None, True, 0, 1.5, "", "decode", [], ["decode"], {}, {"role": None}, {"role": 5}, {"role": ""},
        {"role": "both"}, {"role": "Decode"}, {"role": ["decode"]}, {"role": {"decode": 1}}, {"ticket": "v1.x.y"},
        {"role": "decode", "ticket": None}, {"role": "decode", "ticket": 5}, {"role": "decode", "ticket": ["v1"]},
        {"role": "decode", "ticket": {"id": "x"}}, {"role": "decode", "address": "10.0.0.1:22"},
        {"role": "decode", "ticket": ""}, {"role": "decode", "ticket": "v1"}, {"role": "decode", "ticket": "v1.."},
        {"role": "decode", "ticket": "v2.aaaa.bbbb"}, {"role": "decode", "ticket": "v1.é.ü"},
        {"role": "decode", "ticket": "a" * 100_000}, {"role": "decode"}, {"role": "prefill"},
        {"role": "prefill", "ticket": "\x00"}, {"role": "describe", "ticket": 1}, NESTED,
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def engine(model: Any, process_group: None) -> Any:
    """One engine with both roles for all these requests: whatever one of them does, the next ones are served."""
    from tests.vllm.modelless import engine_config

    engine = ModellessEngine(engine_config(model, "kv_both"), 64)
    yield engine
    engine.close()


def answer(engine: ModellessEngine, fields: Any, **sampling: Any) -> list[int]:
    """Serve one request to its end; nothing of it may be left."""
    request = engine.add(PROMPT, fields, **{"max_tokens": 3, **sampling})
    deadline = time.monotonic() + 10
    while not engine.is_idle:
        assert time.monotonic() < deadline
        engine.step()
    return engine.outputs[request.request_id]


def refusals(engine: ModellessEngine) -> dict[str, int]:
    prefix = "tickets_refused_"
    return {name.removeprefix(prefix): n for name, n in engine.counts.items() if name.startswith(prefix)}


def new_refusals(engine: ModellessEngine, before: dict[str, int]) -> dict[str, int]:
    return {name: n - before.get(name, 0) for name, n in refusals(engine).items() if n != before.get(name, 0)}


@pytest.mark.parametrize("fields", IGNORED, ids=repr)
def test_requests_without_our_fields_are_served_as_ever(engine: ModellessEngine, fields: Any) -> None:
    before = refusals(engine)
    assert answer(engine, fields) == expected_tokens(PROMPT, 3)
    assert new_refusals(engine, before) == {}


@pytest.mark.parametrize("fields", MALFORMED, ids=lambda fields: repr(fields["mooncake"])[:60])
def test_malformed_fields_are_counted_and_the_request_is_computed(engine: ModellessEngine, fields: Any) -> None:
    before = refusals(engine)
    assert answer(engine, fields) == expected_tokens(PROMPT, 3)
    ((reason, count),) = new_refusals(engine, before).items()
    assert (reason in ("malformed", "forged"), count) == (True, 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
near_misses = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["prefill", "decode", "describe", "both"]) | json_values,
        "ticket": json_values
        | st.text(max_size=200)
        | st.from_regex(r"v1\.[A-Za-z0-9_-]{0,80}\.[A-Za-z0-9_-]{0,43}", fullmatch=True),
        "x": json_values,
    },
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["mooncake", "do_remote_prefill", "x"]), json_values | near_misses, max_size=3))
@settings(max_examples=150)
def test_whatever_is_written_the_engine_goes_on(engine: ModellessEngine, fields: dict[str, Any]) -> None:
    assert answer(engine, fields, max_tokens=2) == expected_tokens(PROMPT, 2)


# --- tickets -----------------------------------------------------------------------------------------------------


def test_a_forged_ticket(engine: ModellessEngine) -> None:
    before = refusals(engine)
    text = sign_ticket(engine.ticket(), b"another cluster's secret")
    assert answer(engine, params("decode", text)) == expected_tokens(PROMPT, 3)
    assert new_refusals(engine, before) == {"forged": 1}


def test_an_expired_ticket(engine: ModellessEngine) -> None:
    before = refusals(engine)
    text = sign_ticket(engine.ticket(expires_at=time.time() - 1), b"")
    assert answer(engine, params("decode", text)) == expected_tokens(PROMPT, 3)
    assert new_refusals(engine, before) == {"expired": 1}


def test_a_ticket_for_another_instance(engine: ModellessEngine) -> None:
    """Prefill instances take only their own; a restarted one is another one."""
    before = refusals(engine)
    text = sign_ticket(engine.ticket(prefill="the one before the restart"), b"")
    assert answer(engine, params("prefill", text), max_tokens=1) == expected_tokens(PROMPT, 1)
    assert new_refusals(engine, before) == {"instance": 1}


@pytest.mark.parametrize("max_tokens", [2, 16])
def test_a_prefill_leg_computes_one_token(engine: ModellessEngine, max_tokens: int) -> None:
    before = refusals(engine)
    text = sign_ticket(engine.ticket(), b"")
    assert answer(engine, params("prefill", text), max_tokens=max_tokens) == expected_tokens(PROMPT, max_tokens)
    assert new_refusals(engine, before) == {"max_tokens": 1}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_ticket_is_used_once_in_each_role(make_engine: Any, role: str) -> None:
    here = make_engine("kv_both", extra={"lease_s": 0.2, "watch_timeout_s": 0.2})
    text = sign_ticket(here.ticket(), b"")
    for refused in ({}, {"reused": 1}):
        assert answer(here, params(role, text), max_tokens=1) == expected_tokens(PROMPT, 1)
        assert refusals(here) == refused


@pytest.mark.parametrize(("started", "asked"), [("kv_producer", "decode"), ("kv_consumer", "prefill")])
def test_an_engine_does_what_it_was_started_for(make_engine: Any, started: str, asked: str) -> None:
    here = make_engine(started)
    text = sign_ticket(here.ticket(), b"")
    assert answer(here, params(asked, text), max_tokens=1) == expected_tokens(PROMPT, 1)
    assert refusals(here) == {"role": 1}


def test_a_request_aborted_as_it_comes(engine: ModellessEngine) -> None:
    """vLLM's front end sends such requests to let a connector clean up."""
    request = engine.add(PROMPT, params("decode", sign_ticket(engine.ticket(), b"")))
    engine.abort(request)
    deadline = time.monotonic() + 10
    while not engine.is_idle:
        assert time.monotonic() < deadline
        engine.step()


def test_names_of_sibling_requests() -> None:
    assert parent_of("0_cmpl-abc") == parent_of("12_cmpl-abc") == "cmpl-abc"
    assert parent_of("cmpl-abc") == "cmpl-abc"
    assert parent_of("x_cmpl-abc") == "x_cmpl-abc"
    assert parent_of("0_") == "0_"
