"""The console's port."""

from __future__ import annotations

import re

import pytest
from mooncake_conductor.core import LeastLoaded, Role
from mooncake_conductor.dialects import VllmDialect
from mooncake_conductor.worker import ConductorConfig
from prometheus_client.parser import text_string_to_metric_families

from mooncake_plugins.errors import ConfigError
from tests.conductor.conductor_cluster import Client, Cluster, completion, scenario
from tests.conductor.simulated_engine import SimulatedEngine


async def metrics(cluster: Cluster) -> dict[str, float]:
    """Samples by name and labels."""
    text = (await cluster.get("/metrics", console=True)).body.decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {s.name + "".join(f" {k}={v}" for k, v in sorted(s.labels.items())): s.value for s in samples}


@scenario
async def test_metrics_count_what_happened() -> None:
    p, d = SimulatedEngine(), SimulatedEngine()
    async with Cluster(prefill=[p], decode=[d]) as cluster:
        await cluster.post(completion())
        answer = await cluster.post(completion(stream=True))
        await cluster.post(completion(prompt_logprobs=1))
        await cluster.post(b"{")
        await cluster.post(completion(), path="/nowhere")
        found = await metrics(cluster)
        prefix = "mooncake_conductor_"
        assert found[prefix + "requests_total path=/v1/completions status=200"] == 3
        assert found[prefix + "requests_total path=/v1/completions status=400"] == 1
        assert found[prefix + "requests_total path=- status=404"] == 1
        assert found[prefix + "pairs_total"] == 2
        assert found[prefix + "fallbacks_total reason=prompt_logprobs"] == 1
        assert found[prefix + "ttft_seconds_count"] == 3
        assert found[prefix + "ttft_seconds_bucket le=+Inf"] == 3
        assert found[prefix + "relayed_bytes_total"] > len(answer.raw)
        assert found[prefix + f"engine_up engine={p.url}"] == 1
        assert found[prefix + f"engine_in_flight engine={d.url}"] == 0


@scenario
async def test_nothing_shows_prompts_tickets_or_keys() -> None:
    p, d = SimulatedEngine(), SimulatedEngine()
    async with Cluster(prefill=[p], decode=[d], engine_key=b"engine-secret-key") as cluster:
        await cluster.post(completion(prompt="confidential words"))
        ticket = (d.seen[0].params or {})["ticket"]
        for path in ("/metrics", "/state", "/health", "/unknown"):
            body = (await cluster.get(path, console=True)).body
            for secret in (b"confidential", ticket.encode(), b"engine-secret-key", b"k" * 32):
                assert secret not in body


@scenario
async def test_with_a_key_only_health_is_open() -> None:
    async with Cluster(coupled=[SimulatedEngine()], console_key=b"console-key-0123") as cluster:
        assert (await cluster.get("/health", console=True)).status == 200
        for headers in ("", "authorization: Bearer wrong\r\n", "authorization: console-key-0123\r\n"):
            answer = await cluster.get("/state", console=True, headers=headers)
            assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
        answer = await cluster.get("/metrics", console=True, headers="authorization: Bearer console-key-0123\r\n")
        assert answer.status == 200 and re.match("text/plain", answer.headers["content-type"])


@scenario
async def test_other_paths_methods_and_garbage() -> None:
    async with Cluster(coupled=[SimulatedEngine()]) as cluster:
        async with Client(cluster.console) as client:
            for method, path, status in (("GET", "/v1/models", 404), ("POST", "/state", 405), ("GET", "/state?x", 200)):
                client.ask(None, path, method=method)
                assert (await client.answer()).status == status
            client.send(b"\x00garbage\r\n\r\n")
            assert (await client.answer()).status == 400
            assert await client.closed()
        assert (await cluster.get("/state", console=True)).status == 200


def test_the_console_leaves_loopback_only_with_a_key() -> None:
    engines = ((Role.COUPLED, "http://127.0.0.1:1"),)
    with pytest.raises(ConfigError, match="--console-key-file"):
        ConductorConfig(engines, LeastLoaded(), VllmDialect(), console_host="0.0.0.0")
    config = ConductorConfig(
        engines, LeastLoaded(), VllmDialect(), console_host="0.0.0.0", console_key=b"0123456789abcdef"
    )
    assert "0123456789abcdef" not in repr(config)
    ConductorConfig(engines, LeastLoaded(), VllmDialect(), host="0.0.0.0")  # the clients' port may be anywhere
