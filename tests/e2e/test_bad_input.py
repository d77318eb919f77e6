"""Lies, nonsense and mismatches, sent to real engines: each is refused by name, and the engine goes on."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mooncake_plugins.handoff import PARAMS_KEY, EngineDescription, Ticket, sign_ticket
from mooncake_plugins.launch import free_ports
from tests.e2e.client import complete, eventually, handoff_counts, post
from tests.e2e.fleets import Fleet, make_model
from tests.e2e.processes import BIN, Process, engine_environment, vllm_argv, wait_until_ready
from tests.e2e.test_equality import random_tokens


def describe(url: str) -> EngineDescription:
    """Ask an engine what it is, as the Conductor does."""
    body = {"model": "tiny", "prompt": [5], "max_tokens": 1, "kv_transfer_params": {PARAMS_KEY: {"role": "describe"}}}
    return msgspec.convert(post(url, "/v1/completions", body).body["kv_transfer_params"][PARAMS_KEY], EngineDescription)


def key_of(pair: Fleet, workdir: Path) -> bytes:
    """The secret that ``mooncake up`` made for this deployment."""
    (path,) = (workdir / "up").glob("secret*")
    return path.read_bytes().strip()


@pytest.mark.parametrize(
    "params",
    [
        {PARAMS_KEY: None},
        {PARAMS_KEY: []},
        {PARAMS_KEY: "decode"},
        {PARAMS_KEY: {}},
        {PARAMS_KEY: {"role": "decode"}},
        {PARAMS_KEY: {"role": "decode", "ticket": 7}},
        {PARAMS_KEY: {"role": "decode", "ticket": "x" * 100_000}},
        {PARAMS_KEY: {"role": "decode", "ticket": "v1.AAAA.BBBB"}},
        {PARAMS_KEY: {"role": "decode", "ticket": "v1.\u00e9.\u00e9"}},
        {PARAMS_KEY: {"role": "root", "ticket": ""}},
        {PARAMS_KEY: {"role": "decode", "ticket": "", "addresses": {"0,0": "127.0.0.1:1"}}},
        {"do_remote_prefill": True, "transfer_id": "x"},
        {"do_remote_prefill": True, PARAMS_KEY: {"role": "decode", "ticket": "v1.A.B"}},
    ],
    ids=str,
)
def test_malformed_fields_never_harm_an_engine(pair: Fleet, expect: Any, params: Any) -> None:
    """The peers' engines die of these: an exception in the scheduler takes every other request along."""
    prompt = random_tokens(40, f"malformed {params}")
    for url in (pair.decode, pair.prefill):
        assert complete(url, prompt, kv_transfer_params=params).token_ids == expect(prompt)


@pytest.mark.parametrize("reason", ["forged", "expired", "reused"])
def test_a_bad_ticket_is_refused_by_name_and_the_answer_is_right(
    pair: Fleet, workdir: Path, expect: Any, reason: str
) -> None:
    prefill = describe(pair.prefill)
    key = b"not the secret of this cluster" if reason == "forged" else key_of(pair, workdir)
    lifetime_s = -5.0 if reason == "expired" else 60.0
    ticket = Ticket(uuid.uuid4().hex, prefill.instance, prefill.addresses, time.time() + lifetime_s)
    params = {PARAMS_KEY: {"role": "decode", "ticket": sign_ticket(ticket, key)}}
    prompt = random_tokens(100, f"ticket {reason}")
    if reason == "reused":
        started = {PARAMS_KEY: {"role": "prefill", "ticket": sign_ticket(ticket, key)}}
        complete(pair.prefill, prompt, max_tokens=1, kv_transfer_params=started)
        assert complete(pair.decode, prompt, kv_transfer_params=params).token_ids == expect(prompt)
    before = handoff_counts(pair.decode)
    assert complete(pair.decode, prompt, kv_transfer_params=params).token_ids == expect(prompt)
    name = f"tickets_refused_{reason}"
    eventually(lambda: handoff_counts(pair.decode)[name] == before[name] + 1, what=name)
    assert handoff_counts(pair.decode)["pulls"] == before["pulls"]


def test_a_clients_own_transfer_fields_do_not_reach_the_engines(pair: Fleet, expect: Any) -> None:
    prompt = random_tokens(70, "client's own fields")
    before = handoff_counts(pair.decode)
    lies = {PARAMS_KEY: {"role": "decode", "ticket": "v1.lie.lie"}}
    answer = complete(pair.endpoint, prompt, kv_transfer_params=lies)
    assert answer.token_ids == expect(prompt)
    eventually(lambda: handoff_counts(pair.decode)["pulls_ok"] == before["pulls_ok"] + 1)
    refused = [name for name in handoff_counts(pair.decode) - before if name.startswith("tickets_refused")]
    assert refused == []


def test_garbage_on_the_ports_of_the_engines(pair: Fleet, expect: Any) -> None:
    for url in (pair.prefill, pair.decode):
        host, _, port = describe(url).addresses["0,0"].rpartition(":")
        for data in (os.urandom(4096), b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64, b"\xff" * 100_000):
            with socket.create_connection((host, int(port)), timeout=10) as sock:
                sock.settimeout(10)
                try:
                    sock.sendall(data)
                    while sock.recv(65536):
                        pass
                except ConnectionError:
                    pass
    prompt = random_tokens(70, "after garbage")
    assert complete(pair.endpoint, prompt).token_ids == expect(prompt)


def test_errors_of_the_endpoint_are_openai_errors(pair: Fleet) -> None:
    cases: list[tuple[bytes, int, str]] = [
        (b'{"model": "tiny", "prompt": [1,', 400, "JSON"),
        (b'{"model": "tiny", "model": "tiny", "prompt": "x"}', 400, "model"),
        (b'{"model": "nobody", "prompt": "x"}', 404, "nobody"),
        (b'{"prompt": "x"}', 400, "model"),
        (b"[]", 400, "object"),
    ]
    for raw, status, word in cases:
        answer = post(pair.endpoint, "/v1/completions", None, raw=raw)
        assert answer.status == status, (raw, answer)
        assert set(answer.body["error"]) >= {"message", "type", "code"}
        assert word in answer.body["error"]["message"]


# --- engines that do not fit together --------------------------------------------------------------


@pytest.fixture(scope="module")
def stranger(workdir: Path) -> Iterator[str]:
    """A prefill engine with other weights, another block size and another dtype."""
    other = make_model(workdir / "other-weights", "--seed", "1")
    (port,) = free_ports("127.0.0.1", 1)
    argv = vllm_argv(other, port, "--kv-connector", "mooncake", "--kv-role", "prefill", "--block-size", "64",
                     "--dtype", "bfloat16")  # fmt: skip
    process = Process("stranger", argv, workdir / "stranger.log", engine_environment())
    try:
        wait_until_ready([(process, f"http://127.0.0.1:{port}/health")])
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stop()


def test_engines_with_other_kv_are_refused_at_start_with_both_values(pair: Fleet, stranger: str, workdir: Path) -> None:
    argv = [str(BIN / "mooncake"), "conductor", "--prefill", stranger, "--decode", pair.decode, "--port", "0",
            "--console-port", "0"]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=engine_environment())
    assert done.returncode != 0
    said = done.stdout + done.stderr
    ours, theirs = describe(pair.decode).fingerprint, describe(stranger).fingerprint
    for name in ("block_size", "dtype", "model"):
        assert name in said and repr(ours[name]) in said and repr(theirs[name]) in said, said


def test_an_engine_without_a_hand_off_port_is_named(pair: Fleet, reference: str) -> None:
    argv = [str(BIN / "mooncake"), "conductor", "--prefill", reference, "--decode", pair.decode, "--port", "0",
            "--console-port", "0"]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=engine_environment())
    assert done.returncode != 0
    assert reference in done.stdout + done.stderr


def test_the_first_forward_of_one_token_in_bfloat16(stranger: str) -> None:
    """On a CPU with AMX this kills a vLLM without our plugin: nobody asked the kernel for the tile registers."""
    assert len(complete(stranger, [9], max_tokens=2).token_ids[0]) == 2
