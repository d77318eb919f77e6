"""Request fields, descriptions and settings: what is accepted, and how the rest is refused."""

from __future__ import annotations

import math
import pickle
from typing import Any

import msgspec
import pytest

from mooncake_plugins.errors import ConfigError
from mooncake_plugins.handoff import (
    DESCRIPTION_VERSION,
    EngineDescription,
    HandoffOptions,
    HandoffStep,
    PrefillWork,
    PullRequest,
    RequestParams,
)
from mooncake_plugins.handoff import _messages as wire


@pytest.mark.parametrize("role", ["prefill", "decode", "describe"])
def test_request_fields_are_a_role_and_a_ticket(role: str) -> None:
    params = msgspec.convert({"role": role, "ticket": "v1.x.y"}, RequestParams)
    assert (params.role, params.ticket) == (role, "v1.x.y")
    assert msgspec.convert({"role": role}, RequestParams).ticket == ""


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"role": "prefill", "address": "10.0.0.1:22"}, "address"),
        ({"role": "both"}, "both"),
        ({"role": 1}, "role"),
        ({}, "role"),
        ({"role": "decode", "ticket": 5}, "ticket"),
        ({"role": "decode", "ticket": None}, "ticket"),
        (["decode", "x"], "array"),
        ("decode", "str"),
        (None, "null"),
    ],
)
def test_other_request_fields_are_refused_by_name(fields: Any, named: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=named):
        msgspec.convert(fields, RequestParams)


def test_a_description_survives_json() -> None:
    description = EngineDescription(
        version=DESCRIPTION_VERSION,
        instance="i",
        role="prefill",
        addresses={"0,0": "127.0.0.1:1"},
        fingerprint={"layers": 2, "dtype": "float32"},
    )
    assert msgspec.json.decode(msgspec.json.encode(description), type=EngineDescription) == description


@pytest.mark.parametrize(
    ("field", "values"),
    [
        *((name, [0, -1, math.nan, math.inf, 86400, "10", None]) for name in (
            "watch_timeout_s", "transfer_timeout_s", "peer_timeout_s", "lease_s",
        )),
        ("readers", [0, 65, -1, 1.5, "2", None]),
        ("read_bytes", [0, 4095, -1, 1e6, "4MiB", None]),
        ("listen_port", [-1, 65536, "80", None]),
        ("listen_host", [None, 5]),
        ("verify", ["false", None, 2]),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_refused_by_name_and_value(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            HandoffOptions(**{field: value})
        assert caught.value.field == field
        assert repr(caught.value.value) == repr(value)


def test_defaults_and_edges_are_accepted() -> None:
    HandoffOptions()
    HandoffOptions(readers=64, read_bytes=4096, listen_port=65535, lease_s=0.001, verify=False, listen_host="10.0.0.1")


def test_what_the_scheduler_tells_the_workers_survives_the_way_to_them() -> None:
    work = PrefillWork("t", "r", 1.0, b"p", 5, (1, 2), True, 0, 2)
    pull = PullRequest("r", "t", "v1.x.y", {"0,0": "h:1"}, b"p", 5, 0, (3,))
    step = HandoffStep(["a"], ["b"], [work], [("c", "d")], [pull], ["e"])
    assert pickle.loads(pickle.dumps(step)) == step


MESSAGES: list[wire.HandoffMessage] = [
    wire.Watch("t", "v1.x.y", "d", b"p", 5, {"layers": 2}),
    wire.Attach("t", "v1.x.y", "d", b"p", 5, {"layers": 2}, "0,0", 3),
    wire.Fetched("t", 1, 2),
    wire.Release("t", "ok"),
    wire.Ping(1),
    wire.Scheduled("t"),
    wire.Attached("t", 0, [0], [8], [8], 4),
    wire.Ready("t", 0, 1, 0, 2, 3, [7, 9]),
    wire.Commit("t", 0, 1, b"\0" * 8),
    wire.Restarted("t", 1),
    wire.Refused("t", "reused", "why"),
    wire.Withdrawn("t", "why"),
    wire.Pong(1),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_survive_the_wire_and_only_in_their_direction(message: wire.HandoffMessage) -> None:
    one, other = (wire.ToDecode, wire.ToPrefill)
    if not isinstance(message, one):
        one, other = other, one
    encoded = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(encoded, type=one) == message
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(encoded, type=other)


@pytest.mark.parametrize("number", [-1, 1 << 62, 1 << 70, 1.5, "1", None])
def test_numbers_that_no_peer_of_ours_sends_are_nonsense(number: Any) -> None:
    for fields in (["ready", "t", 0, 1, 0, 1, 0, [number]], ["ready", "t", 0, 1, 0, 1, number, [1]]):
        with pytest.raises((msgspec.DecodeError, OverflowError)):
            msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=wire.ToDecode)
    for layout in ([[number], [8], [8], 4], [[0], [number], [8], 4], [[0], [8], [number], 4], [[0], [8], [8], number]):
        with pytest.raises((msgspec.DecodeError, OverflowError)):
            msgspec.msgpack.decode(msgspec.msgpack.encode(["attached", "t", 0, *layout]), type=wire.ToDecode)
