"""What goes to the engines and what comes back, when nothing fails."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from mooncake_conductor.core import RoundRobin

from mooncake_plugins.handoff import verify_ticket
from tests.conductor.conductor_cluster import KEY, Cluster, completion, scenario, until
from tests.conductor.simulated_engine import EVENTS, PLAIN, STREAM_HEAD, Connection, Received, SimulatedEngine, chunk


def pair() -> tuple[SimulatedEngine, SimulatedEngine]:
    return SimulatedEngine(instance="p-1"), SimulatedEngine(instance="d-1")


@scenario
async def test_a_request_is_sent_as_two_legs_with_one_signed_ticket() -> None:
    p, d = pair()
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        answer = await cluster.post(completion(n=2, temperature=0.5, unknown={"x": [1]}))
        assert (answer.status, answer.body) == (200, PLAIN)
        (to_p,), (to_d,) = p.seen, d.seen
        assert to_p.params is not None and to_d.params is not None
        assert (to_p.params["role"], to_d.params["role"]) == ("prefill", "decode")
        assert to_p.params["ticket"] == to_d.params["ticket"]
        ticket = verify_ticket(to_p.params["ticket"], KEY, time.time())
        assert (ticket.prefill, ticket.addresses) == ("p-1", p.addresses)
        assert len(ticket.id) == 32 and ticket.expires_at > time.time()
        body_p, body_d = to_p.json, to_d.json
        assert {**body_p, "kv_transfer_params": 0} == {
            "model": "tiny",
            "prompt": "Say hello",
            "temperature": 0.5,
            "unknown": {"x": [1]},
            "max_tokens": 1,
            "n": 1,
            "stream": False,
            "kv_transfer_params": 0,
        }
        assert {**body_d, "kv_transfer_params": 0} == {
            **completion(n=2, temperature=0.5, unknown={"x": [1]}),
            "kv_transfer_params": 0,
        }
        assert (await cluster.counters())["pairs"] == 1


@scenario
async def test_every_request_has_its_own_ticket() -> None:
    p, d = pair()
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        for _ in range(5):
            await cluster.post(completion())
        tickets = {verify_ticket((r.params or {})["ticket"], KEY, time.time()).id for r in d.seen}
        assert len(tickets) == 5


@scenario
async def test_both_legs_are_sent_at_once() -> None:
    p, d = pair()
    together = asyncio.Barrier(2)

    async def meet(connection: Connection, received: Received) -> None:
        await together.wait()
        connection.plain()

    p.behave = d.behave = meet
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        assert (await cluster.post(completion())).status == 200


@pytest.mark.parametrize("value", [{"mooncake": {"role": "decode", "ticket": "forged"}}, None, {"remote_host": "x"}, 3])
@scenario
async def test_the_clients_own_transfer_parameters_reach_no_engine(value: object) -> None:
    p, d = pair()
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        assert (await cluster.post(completion(kv_transfer_params=value))).status == 200
        for received in (*p.seen, *d.seen):
            assert received.body.count(b"kv_transfer_params") == 1
            assert verify_ticket((received.params or {})["ticket"], KEY, time.time()).prefill == "p-1"
        assert (await cluster.post(completion(kv_transfer_params=value, prompt_logprobs=1))).status == 200
        assert "kv_transfer_params" not in d.seen[-1].json


@scenario
async def test_a_stream_is_relayed_byte_for_byte() -> None:
    p, d = pair()
    wire = STREAM_HEAD + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"

    async def piecemeal(connection: Connection, received: Received) -> None:
        for at in range(0, len(wire), 7):  # across heads, chunk headers and chunk ends
            connection.write(wire[at : at + 7])
            await asyncio.sleep(0)

    d.behave = piecemeal
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        answer = await cluster.post(completion(stream=True))
        assert answer.raw == wire
        assert answer.body == b"".join(EVENTS)
        assert d.seen[0].json["stream"] is True
        assert p.seen[0].json["stream"] is False
        counters = await cluster.counters()
        assert counters["relayed_bytes"] == len(wire)
        assert counters["relayed_chunks"] >= 1


@scenario
async def test_chunks_arrive_as_they_are_made() -> None:
    p, d = pair()
    go_on = asyncio.Event()

    async def in_two(connection: Connection, received: Received) -> None:
        connection.write(STREAM_HEAD + chunk(EVENTS[0]))
        await go_on.wait()
        connection.write(chunk(EVENTS[1]) + b"0\r\n\r\n")

    d.behave = in_two
    async with Cluster(prefill=[p], decode=[d]) as cluster, cluster.client() as client:
        client.ask(completion(stream=True))
        first = b""
        while EVENTS[0] not in first:
            first += await client.read()
        go_on.set()
        assert (await client.read()).endswith(b"0\r\n\r\n")


@scenario
async def test_large_bodies_and_answers_pass_unchanged() -> None:
    p, d = pair()
    prompt, text = "é" * 700_000, json.dumps({"text": "x" * 3_000_000}).encode()

    async def big(connection: Connection, received: Received) -> None:
        assert received.json["prompt"] == prompt
        connection.plain(text if received.json["max_tokens"] == 8 else PLAIN)

    p.behave = d.behave = big
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        assert (await cluster.post(completion(prompt=prompt))).body == text


@scenario
async def test_chat_goes_to_the_chat_endpoint() -> None:
    p, d = pair()
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 9, "stream": True, "stream_options": {"a": 1}}
        assert (await cluster.post(body, "/v1/chat/completions")).status == 200
        assert p.seen[0].path == d.seen[0].path == "/v1/chat/completions"
        assert p.seen[0].json["max_completion_tokens"] == 1
        assert not p.seen[0].json.keys() & {"max_tokens", "stream_options"}
        assert d.seen[0].json["max_tokens"] == 9


@scenario
async def test_only_known_headers_reach_an_engine() -> None:
    p, d = pair()
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        headers = "Authorization: Bearer mine\r\nX-Request-Id: r1\r\nTraceparent: t\r\nCookie: c\r\nX-Other: o\r\n"
        await cluster.post(completion(), headers=headers + "Accept-Encoding: gzip\r\n")
        for received in (*p.seen, *d.seen):
            assert received.headers == {
                "host": received.headers["host"],
                "content-type": "application/json",
                "content-length": str(len(received.body)),
                "authorization": "Bearer mine",
                "x-request-id": "r1",
                "traceparent": "t",
            }


@scenario
async def test_an_engine_key_replaces_the_clients() -> None:
    p, d = pair()
    async with Cluster(prefill=[p], decode=[d], engine_key=b"engine-key") as cluster:
        await cluster.post(completion(), headers="Authorization: Bearer mine\r\n")
        assert d.seen[0].headers["authorization"] == p.seen[0].headers["authorization"] == "Bearer engine-key"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1}, "echo_logprobs"),
        ({"prompt": ["a", "b"]}, "several_prompts"),
        ({"prompt": [[1, 2], [3]]}, "several_prompts"),
        ({"use_beam_search": True}, "beam_search"),
        ({"truncate_prompt_tokens": 5}, "truncated_prompt"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"max_tokens": 0, "echo": True}, "no_tokens"),
    ],
)
@scenario
async def test_what_must_not_be_split_runs_on_a_decode_engine_alone(fields: dict[str, object], reason: str) -> None:
    p, d = pair()
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        assert (await cluster.post(completion(**fields))).status == 200
        assert not p.seen and d.seen[0].json == completion(**fields)
        counters = await cluster.counters()
        assert counters["fallbacks"] == {reason: 1} and counters["pairs"] == 0


@pytest.mark.parametrize("prompt", ["a", ["a"], [1, 2, 3], [[1, 2, 3]], []])
@scenario
async def test_one_prompt_in_any_form_is_split(prompt: object) -> None:
    p, d = pair()
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        await cluster.post(completion(prompt=prompt, echo=True, prompt_logprobs=None, use_beam_search=False))
        assert p.seen[0].json["prompt"] == d.seen[0].json["prompt"] == prompt
        assert "echo" not in p.seen[0].json and d.seen[0].json["echo"] is True


@scenario
async def test_engines_for_both_roles_are_paired_with_each_other() -> None:
    a, b = SimulatedEngine(instance="a"), SimulatedEngine(instance="b")
    async with Cluster(both=[a, b], policy=RoundRobin()) as cluster:
        for _ in range(4):
            await cluster.post(completion())
        for engine in (a, b):
            assert sorted((r.params or {})["role"] for r in engine.seen) == ["decode", "decode", "prefill", "prefill"]
        for p, d in ((a, b), (b, a)):
            given = {(r.params or {})["ticket"] for r in p.seen if (r.params or {})["role"] == "prefill"}
            taken = {(r.params or {})["ticket"] for r in d.seen if (r.params or {})["role"] == "decode"}
            assert given == taken


@scenario
async def test_one_engine_for_both_roles_works_alone() -> None:
    engine = SimulatedEngine()
    async with Cluster(both=[engine]) as cluster:
        assert (await cluster.post(completion())).status == 200
        assert engine.seen[0].json == completion()
        assert (await cluster.counters())["fallbacks"] == {"single_engine": 1}


@scenario
async def test_coupled_engines_need_no_connector() -> None:
    engine = SimulatedEngine(has_connector=False)
    async with Cluster(coupled=[engine]) as cluster:
        body = b' {"model":"tiny",  "prompt":"x" }'
        assert (await cluster.post(body)).status == 200
        assert engine.seen[0].body == body and not engine.described
        assert (await cluster.counters())["fallbacks"] == {}


@scenario
async def test_load_is_spread_by_requests_in_flight() -> None:
    engines = [SimulatedEngine(has_connector=False) for _ in range(3)]
    release = asyncio.Event()

    async def hold(connection: Connection, received: Received) -> None:
        await release.wait()
        connection.plain()

    for engine in engines:
        engine.behave = hold
    async with Cluster(coupled=engines) as cluster:
        requests = [asyncio.create_task(cluster.post(completion())) for _ in range(9)]
        await until(lambda: sum(len(engine.seen) for engine in engines) == 9)
        assert [len(engine.seen) for engine in engines] == [3, 3, 3]
        release.set()
        assert {(await request).status for request in requests} == {200}


@scenario
async def test_models_and_health() -> None:
    p, d = pair()
    d.models = ("tiny", "only-on-decode")
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        answer = await cluster.get("/v1/models")
        assert [card["id"] for card in answer.json["data"]] == ["tiny", "only-on-decode"]
        assert (await cluster.get("/health")).status == 200
        await p.stop()
        await until(lambda: _status(cluster, 503))


async def _status(cluster: Cluster, status: int) -> bool:
    return (await cluster.get("/health")).status == status


@scenario
async def test_the_answer_of_a_decode_engine_that_ends_before_its_prefill_is_complete() -> None:
    p, d = pair()
    release = asyncio.Event()

    async def late(connection: Connection, received: Received) -> None:
        await release.wait()
        connection.plain()

    p.behave = late
    async with Cluster(prefill=[p], decode=[d]) as cluster, cluster.client() as client:
        for _ in range(3):  # the same connection goes on
            client.ask(completion())
            assert (await client.answer()).body == PLAIN
        release.set()
        await until(cluster.is_quiet)
        assert len(p.seen) == 3


@scenario
async def test_connections_to_engines_are_kept() -> None:
    p, d = pair()
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        await cluster.post(completion())
        before = set(d.connections)
        for stream in (False, True, False):
            await cluster.post(completion(stream=stream))
            await until(cluster.is_quiet)
        assert set(d.connections) == before
