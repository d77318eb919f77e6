"""Bodies of which only the top level is decoded."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mooncake_conductor.dialects import BodyError, Endpoint, VllmDialect, parse_body

from mooncake_plugins.errors import ConductorError


class Repeated(Exception):
    """The reference found a top-level key twice."""


NAMES = st.one_of(
    st.text(max_size=3), st.sampled_from(["model", "prompt", "a", "b", 'q"', "\\", "é", "\u2028", "\x01"])
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
SPACE = st.text(alphabet=" \t\r\n", max_size=2)


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """JSON objects, perhaps with repeated keys, in any spacing and escaping."""
    members = []
    for name, value in draw(st.lists(st.tuples(NAMES, VALUES), max_size=5)):
        key = json.dumps(name, ensure_ascii=draw(st.booleans()))
        if draw(st.booleans()) and name.isascii() and name.isalpha():
            key = '"' + "".join(f"\\u{ord(c):04x}" for c in name) + '"'
        text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
        members.append(draw(SPACE) + key + draw(SPACE) + ":" + draw(SPACE) + text + draw(SPACE))
    text = draw(SPACE) + "{" + ",".join(members) + (draw(SPACE) if not members else "") + "}" + draw(SPACE)
    return text.encode("utf-8", "surrogatepass")


def reference(data: bytes) -> dict[str, Any]:
    """What Python's own decoder makes of it; raises `Repeated` or ValueError."""
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # the outermost object comes last
        return dict(found)

    value = json.loads(data.decode(), object_pairs_hook=keep)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if len({name for name, _ in pairs}) != len(pairs):
        raise Repeated
    return value


@given(objects())
@example(b"{}")
@example(b'{"a":1,"a":1}')
@example(b'{"a":12,"a":1}')
@example(b'{"a":1,"a":12}')
@example(b'{"a": 1, "b": 2, "a": 1}')
@example(b'{"model": 1, "n": 2, "model": 1}')
@example(b'{"model":1,"n":2,"model":1}')
@example(b'{"model":"\\",\\"n\\":","n":1}')
def test_objects_are_read_as_python_reads_them(data: bytes) -> None:
    try:
        expected = reference(data)
    except Repeated:
        with pytest.raises(BodyError, match="more than once") as caught:
            parse_body(data)
        assert caught.value.code == "duplicate_field"
        return
    except ValueError:
        with pytest.raises(BodyError):
            parse_body(data)
        return
    body = parse_body(data)
    assert {name: json.loads(bytes(raw)) for name, raw in body.fields.items()} == expected


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\u01a \n', max_size=40).map(str.encode))
def test_nothing_is_accepted_that_python_refuses(data: bytes) -> None:
    try:
        body = parse_body(data)
    except BodyError:
        return
    expected = reference(data)
    assert {name: json.loads(bytes(raw)) for name, raw in body.fields.items()} == expected


@given(objects(), st.sets(NAMES, max_size=3))
def test_editing_changes_only_what_it_is_told(data: bytes, drop: set[str]) -> None:
    try:
        body = parse_body(data)
    except BodyError:
        return
    expected = {name: value for name, value in reference(data).items() if name not in drop}
    assert reference(body.edited(drop)) == expected
    if "new" not in expected:
        assert reference(body.edited(drop, b'"new":[1,2]')) == expected | {"new": [1, 2]}
    if not drop & body.fields.keys():
        assert body.edited(drop) is data


@given(st.dictionaries(st.sampled_from(["model", "prompt", "max_tokens", "stream", "n"]), VALUES))
def test_the_usual_spacings_are_read_alike(value: dict[str, Any]) -> None:
    for separators in ((",", ":"), (", ", ": ")):
        body = parse_body(json.dumps(value, separators=separators).encode())
        assert {name: json.loads(bytes(raw)) for name, raw in body.fields.items()} == value


# --- the vLLM dialect

DIALECT = VllmDialect()
EVERYTHING = {
    "model": "m",
    "prompt": "p",
    "max_tokens": 100,
    "max_completion_tokens": 100,
    "min_tokens": 50,
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 3,
    "best_of": 4,
    "logprobs": 5,
    "top_logprobs": 5,
    "temperature": 0.7,
    "seed": 3,
    "stop": ["x"],
    "tools": [{"type": "function"}],
    "response_format": {"type": "json_object"},
    "cache_salt": "s",
    "kv_transfer_params": {"mooncake": {"role": "decode", "ticket": "mine"}},
}
KEPT = ("model", "prompt", "temperature", "seed", "stop", "tools", "response_format", "cache_salt")


@pytest.mark.parametrize("endpoint", list(Endpoint))
def test_the_prefill_leg_is_the_same_prompt_made_cheap(endpoint: Endpoint) -> None:
    leg = reference(DIALECT.prefill_leg(endpoint, parse_body(json.dumps(EVERYTHING).encode()), "T"))
    limit = "max_tokens" if endpoint is Endpoint.COMPLETIONS else "max_completion_tokens"
    kept = {name: EVERYTHING[name] for name in KEPT}
    params = {"mooncake": {"role": "prefill", "ticket": "T"}}
    assert leg == kept | {limit: 1, "n": 1, "stream": False, "kv_transfer_params": params}


@pytest.mark.parametrize("endpoint", list(Endpoint))
def test_the_decode_leg_is_the_clients_request_with_our_ticket(endpoint: Endpoint) -> None:
    leg = reference(DIALECT.decode_leg(endpoint, parse_body(json.dumps(EVERYTHING).encode()), "T"))
    assert leg == EVERYTHING | {"kv_transfer_params": {"mooncake": {"role": "decode", "ticket": "T"}}}


def test_facts() -> None:
    body = parse_body(b'{"model":"m\\u00e9","prompt":"abc","stream": true}')
    facts = DIALECT.facts(Endpoint.COMPLETIONS, body)
    assert facts == ("mé", True, None, 5)
    assert DIALECT.facts(Endpoint.CHAT, parse_body(b'{"model":"m","messages":[1]}')).prompt_bytes == 3


def test_a_list_of_prompts_is_found_behind_any_space() -> None:
    for prompt, reason in (
        (b'[%b"a","b"]', "several_prompts"),
        (b'[%b"a"]', None),
        (b"[%b[1],[2]]", "several_prompts"),
    ):
        body = parse_body(b'{"model":"m","prompt":%b}' % (prompt % (b" \n" * 500)))
        assert DIALECT.facts(Endpoint.COMPLETIONS, body).whole == reason


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (404, b"no", "HTTP 404"),
        (200, b"[]", "cannot be read"),
        (200, b"{}", "no mooncake connector"),
        (200, b'{"kv_transfer_params":{"other":1}}', "no mooncake connector"),
        (200, b'{"kv_transfer_params":{"mooncake":{"role":"x"}}}', "cannot be read"),
        (200, b"\xff", "cannot be read"),
    ],
)
def test_answers_to_the_describe_probe_that_are_refused(status: int, answer: bytes, message: str) -> None:
    with pytest.raises(ConductorError, match=message):
        DIALECT.read_description(status, answer)


@pytest.mark.parametrize(("status", "answer"), [(401, b"{}"), (200, b"{}"), (200, b'{"data":[{}]}'), (200, b"\xff")])
def test_model_lists_that_are_refused(status: int, answer: bytes) -> None:
    with pytest.raises(ConductorError):
        DIALECT.read_models(status, answer)
