"""Helpers for programs that drive engines themselves."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from mooncake_vllm import handoff_params, kv_transfer_config, new_ticket, read_description

from mooncake_plugins.errors import ConfigError, HandoffError
from mooncake_plugins.handoff import EngineDescription, verify_ticket
from tests.vllm.modelless import engine_config

DESCRIPTION = EngineDescription(
    version=1, instance="i", role="prefill", addresses={"0,0": "127.0.0.1:5"}, fingerprint={"dtype": "float32"}
)


@pytest.mark.parametrize(
    ("role", "stated"), [("prefill", "kv_producer"), ("decode", "kv_consumer"), ("both", "kv_both")]
)
def test_a_role_becomes_a_configuration(role: Any, stated: str) -> None:
    assert kv_transfer_config(role) == {
        "kv_connector": "mooncake",
        "kv_role": stated,
        "kv_load_failure_policy": "recompute",
    }


def test_options_go_to_the_connector(model: Any) -> None:
    from mooncake_vllm._settings import settings_of

    config = engine_config(model, kv_transfer_config=kv_transfer_config("decode", lease_s=7, readers=3))
    settings = settings_of(config)
    assert (settings.role, settings.options.lease_s, settings.options.readers) == ("decode", 7, 3)
    with pytest.raises(ConfigError, match="leases"):
        engine_config(model, kv_transfer_config=kv_transfer_config("decode", leases=7))


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_producer"):
        kv_transfer_config("kv_producer")  # type: ignore[arg-type]


def test_request_fields() -> None:
    assert handoff_params("decode", "v1.x.y") == {"mooncake": {"role": "decode", "ticket": "v1.x.y"}}
    assert handoff_params("describe") == {"mooncake": {"role": "describe"}}


def test_a_description_is_read_from_an_answer() -> None:
    assert read_description({"mooncake": msgspec.to_builtins(DESCRIPTION)}) == DESCRIPTION


@pytest.mark.parametrize("answered", [None, {}, {"mooncake": None}, {"mooncake": {"version": 1}}, {"other": 1}])
def test_an_answer_without_one_says_so(answered: Any) -> None:
    with pytest.raises(HandoffError, match="did not describe itself"):
        read_description(answered)


def test_tickets_are_new_and_signed() -> None:
    key = b"a cluster's secret"
    first, second = (verify_ticket(new_ticket(DESCRIPTION, key=key, lifetime_s=9), key, time.time()) for _ in range(2))
    assert first.id != second.id
    assert (first.prefill, first.addresses) == ("i", {"0,0": "127.0.0.1:5"})
    assert 0 < first.expires_at - time.time() <= 9
