"""Bad requests: each has a clear OpenAI-style error, and the Conductor lives on."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conductor.conductor_cluster import Cluster, completion, scenario, until
from tests.conductor.simulated_engine import EVENTS, PLAIN, SimulatedEngine

BODY = json.dumps(completion()).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b"nonsense", "invalid_json", None),
        (b"[1]", "invalid_json", None),
        (b'"text"', "invalid_json", None),
        (b'{"model":"tiny"} {}', "invalid_json", None),
        (b'{"model":"tiny","x":NaN}', "invalid_json", None),
        (b'{"model":"tiny","x":"\xff"}', "invalid_json", None),
        (b'{"model":"tiny","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "invalid_json", None),
        (b'{"model":"tiny","model":"tiny"}', "duplicate_field", "model"),
        (b'{"model":"tiny","prompt":"a","prompt":"b"}', "duplicate_field", "prompt"),
        (b'{"model":"tiny","pr\\u006fmpt":"a","prompt":"b"}', "duplicate_field", "prompt"),
        (b'{"prompt":"a"}', "missing_field", "model"),
        (b'{"model":3}', "invalid_type", "model"),
        (b'{"model":null}', "invalid_type", "model"),
    ],
)
@scenario
async def test_bodies_that_cannot_be_accepted(body: bytes, code: str, param: str | None) -> None:
    engine = SimulatedEngine()
    async with Cluster(coupled=[engine]) as cluster, cluster.client() as client:
        client.ask(body)
        answer = await client.answer()
        assert answer.status == 400
        assert (answer.error["code"], answer.error["param"]) == (code, param)
        assert answer.error["type"] == "invalid_request_error"
        assert not engine.seen
        client.ask(completion())  # the connection goes on
        assert (await client.answer()).status == 200


@scenario
async def test_unknown_models_paths_methods_and_types() -> None:
    async with Cluster(coupled=[SimulatedEngine()]) as cluster, cluster.client() as client:
        client.ask(completion(model="other"))
        answer = await client.answer()
        assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
        for method, path, status in (
            ("POST", "/v1/unknown", 404),
            ("GET", "/", 404),
            ("GET", "/v1/completions", 405),
            ("POST", "/v1/models", 405),
            ("DELETE", "/health", 405),
        ):
            client.ask(b"", path, method=method)
            answer = await client.answer()
            assert answer.status == status and answer.error["message"]
            assert ("allow" in answer.headers) == (status == 405)
        client.send(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        assert (await client.answer()).status == 415
        client.ask(completion(), "/v1/completions?api-version=1")
        assert (await client.answer()).status == 200


@scenario
async def test_a_body_that_is_too_large_is_refused_before_it_is_sent() -> None:
    async with Cluster(coupled=[SimulatedEngine()], max_body_bytes=1000) as cluster:
        async with cluster.client() as client:
            client.send(HEAD + b"content-length: 1001\r\nexpect: 100-continue\r\n\r\n")
            answer = await client.answer()
            assert (answer.status, answer.error["code"]) == (413, "body_too_large")
            assert answer.headers["connection"] == "close" and await client.closed()
        async with cluster.client() as client:  # already on its way: the answer still arrives
            client.send(HEAD + b"content-length: 9000000\r\n\r\n" + b"x" * 9_000_000)
            assert (await client.answer()).status == 413
        async with cluster.client() as client:
            client.send(HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1f4\r\n" + b"x" * 500 + b"\r\n")
            client.send(b"1f5\r\n" + b"x" * 501 + b"\r\n")
            assert (await client.answer()).status == 413


@scenario
async def test_expect_continue_and_chunked_bodies() -> None:
    engine = SimulatedEngine()
    async with Cluster(coupled=[engine]) as cluster, cluster.client() as client:
        client.send(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(BODY))
        assert await client.read() == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(BODY)
        assert (await client.answer()).status == 200
        client.send(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for at in range(0, len(BODY), 10):
            piece = BODY[at : at + 10]
            client.send(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece))
        client.send(b"0\r\nhost: trailer\r\n\r\n")
        assert (await client.answer()).status == 200
        assert [received.body for received in engine.seen] == [BODY, BODY]
        assert engine.seen[1].headers["content-length"] == str(len(BODY))
        client.send(HEAD + b"expect: tea\r\ncontent-length: 0\r\n\r\n")
        assert (await client.answer()).status == 417


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x00" * 100, 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\nhost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n y: folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nhost: a\n\n", 400),
        (HEAD + b"content-length: ten\r\n\r\n", 400),
        (HEAD + b"content-length: -1\r\n\r\n", 400),
        (HEAD + b"content-length: +5\r\n\r\nhello", 400),
        (HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello", 400),
        (HEAD + b"content-length: 5, 5\r\n\r\nhello", 400),
        (HEAD + b"content-length: 99999999999999999999999\r\n\r\n", 400),
        (HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n", 400),
        (HEAD + b"upgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\n{}", 400),
        (b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (HEAD + b"x-request-id: a\x00b\r\ncontent-length: 2\r\n\r\n{}", 400),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 431),
        (HEAD + b"x: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (HEAD + b"x: y\r\n" * 20_000, 431),
    ],
)
@scenario
async def test_what_is_not_http_is_refused_and_closed(data: bytes, status: int) -> None:
    engine = SimulatedEngine()
    async with Cluster(coupled=[engine]) as cluster:
        async with cluster.client() as client:
            client.send(data)
            answer = await client.answer()
            assert answer.status == status and answer.is_complete
            assert answer.error["type"] == "invalid_request_error"
            assert await client.closed()
        assert not engine.seen
        assert (await cluster.post(completion())).status == 200


@scenario
async def test_a_second_request_hidden_in_the_first_is_not_seen_by_an_engine() -> None:
    """Bytes after a refused request are never parsed as another one."""
    engine = SimulatedEngine()
    hidden = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
    async with Cluster(coupled=[engine]) as cluster:
        async with cluster.client() as client:
            client.send(HEAD + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + hidden)
            assert (await client.answer()).status == 400
            assert await client.closed()
        assert not engine.seen


@scenario
async def test_pipelined_requests_are_answered_in_order() -> None:
    engine = SimulatedEngine()
    count = 100
    async with Cluster(coupled=[engine]) as cluster, cluster.client() as client:
        for number in range(count):
            client.ask(completion(number=number))
        client.send(b"garbage\r\n\r\n")
        data = b""
        while not data.endswith(b"}}"):
            data += await client.read()
        assert data.count(PLAIN) == count and data.count(b"HTTP/1.1 400 ") == 1
        assert data.index(b"HTTP/1.1 400 ") > data.rindex(PLAIN)
        assert [received.json["number"] for received in engine.seen] == list(range(count))
        assert await client.closed()


@scenario
async def test_many_errors_in_one_packet() -> None:
    async with Cluster(coupled=[SimulatedEngine()]) as cluster, cluster.client() as client:
        client.send(b"GET /nothing HTTP/1.1\r\nhost: a\r\n\r\n" * 3000)
        data = b""
        while data.count(b"HTTP/1.1 404 ") < 3000:
            data += await client.read()


@scenario
async def test_requests_that_do_not_arrive_are_given_up() -> None:
    async with Cluster(coupled=[SimulatedEngine()], receive_s=0.5, keep_alive_s=0.3) as cluster:
        async with cluster.client() as client:
            client.send(b"POST /v1/comp")
            assert (await client.answer()).status == 408
            assert await client.closed()
        async with cluster.client() as client:
            client.send(HEAD + b"content-length: 5\r\n\r\nab")
            assert (await client.answer()).status == 408
        async with cluster.client() as client:
            assert await client.closed()  # idle


@scenario
async def test_connections_beyond_the_limit_are_refused() -> None:
    async with Cluster(coupled=[SimulatedEngine()], max_connections=2) as cluster:
        async with cluster.client() as a, cluster.client() as b:
            for client in (a, b):
                client.ask(completion())
                assert (await client.answer()).status == 200
            async with cluster.client() as c:
                assert (await c.answer()).status == 503
                assert await c.closed()
        await until(lambda: _accepts(cluster))


async def _accepts(cluster: Cluster) -> bool:
    return (await cluster.post(completion())).status == 200


@scenario
async def test_old_clients_and_clients_that_close() -> None:
    engine = SimulatedEngine()
    async with Cluster(coupled=[engine]) as cluster:
        async with cluster.client() as client:
            client.send(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY)
            answer = await client.answer()
            assert (answer.body, answer.headers["connection"]) == (PLAIN, "close")
            assert await client.closed()
        async with cluster.client() as client:
            head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"host: x\r\n", b"")
            client.send(head + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
            answer = await client.answer()
            assert (answer.body, answer.headers["connection"]) == (PLAIN, "close")
            assert await client.closed()
            assert engine.seen[-1].version == "1.0"
        body = json.dumps(completion(stream=True)).encode()
        async with cluster.client() as client:  # the engine answers in chunks all the same
            client.send(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            answer = await client.answer()
            assert answer.body == b"".join(EVENTS) and "transfer-encoding" not in answer.headers
            assert answer.headers["content-type"].startswith("text/event-stream")


@scenario
async def test_head_requests_have_no_body_and_targets_may_name_the_host() -> None:
    async with Cluster(coupled=[SimulatedEngine()]) as cluster, cluster.client() as client:
        for path in (b"/health", b"/nothing"):
            client.send(b"HEAD %b HTTP/1.1\r\nhost: x\r\n\r\n" % path)
            assert (await client.read()).endswith(b"\r\n\r\n")
        client.send(b"GET http://x/health?a HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.answer()).status == 200


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=5, max_size=20))
def test_random_bytes_on_both_ports(pieces: list[bytes]) -> None:
    @scenario
    async def run() -> None:
        async with Cluster(coupled=[SimulatedEngine()]) as cluster:
            for number, piece in enumerate(pieces):
                async with cluster.client() if number % 2 else type(cluster.client())(cluster.console) as client:
                    client.send(piece + b"\r\n\r\n")
                    client.writer.write_eof()
                    while await client.read():
                        pass
            assert (await cluster.post(completion())).status == 200
            assert (await cluster.state())["is_ready"]

    run()
