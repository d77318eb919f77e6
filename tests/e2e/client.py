"""A client of the OpenAI API for tests, and readings of what engines count."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 120.0
GREEDY: Mapping[str, Any] = {"model": "tiny", "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@dataclass(frozen=True)
class Answer:
    """Status and decoded body of an answer."""

    status: int
    body: Any

    @property
    def choices(self) -> list[Any]:
        assert self.status == 200, self.body
        return list(self.body["choices"])

    @property
    def token_ids(self) -> list[list[int]]:
        """Token ids of every choice, in the order of their index."""
        return [choice["token_ids"] for choice in sorted(self.choices, key=lambda c: int(c["index"]))]


def post(url: str, path: str, body: Any, *, timeout_s: float = TIMEOUT_S, raw: bytes | None = None) -> Answer:
    """POST JSON (or raw bytes) and decode the answer, whatever its status."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        data = json.dumps(body).encode() if raw is None else raw
        connection.request("POST", path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
        return Answer(answer.status, json.loads(answer.read()))
    finally:
        connection.close()


def complete(url: str, prompt: Any, **more: Any) -> Answer:
    """POST /v1/completions, greedy."""
    return post(url, "/v1/completions", {**GREEDY, "max_tokens": 16, "prompt": prompt, **more})


def chat(url: str, text: str, **more: Any) -> Answer:
    """POST /v1/chat/completions, greedy."""
    body = {**GREEDY, "max_tokens": 16, "messages": [{"role": "user", "content": text}], **more}
    return post(url, "/v1/chat/completions", body)


def stream(url: str, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
    """POST with ``stream`` and yield the decoded events."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", path, json.dumps({**body, "stream": True}), {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])
    finally:
        connection.close()


def streamed_tokens(url: str, prompt: Any, **more: Any) -> list[int]:
    """Stream a completion and return its token ids."""
    body = {**GREEDY, "max_tokens": 16, "prompt": prompt, **more}
    return [
        token for event in stream(url, "/v1/completions", body) for c in event["choices"] for token in c["token_ids"]
    ]


def open_and_send(url: str, path: str, body: Mapping[str, Any]) -> socket.socket:
    """Send a request and return the socket, unread: for clients that leave."""
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    sock = socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    sock.sendall(head.encode() + data)
    return sock


# --- what engines count ----------------------------------------------------------------------------


def scrape(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def handoff_counts(url: str) -> Counter[str]:
    """Return the hand-off events that an engine has counted, by name."""
    rows = re.findall(r'^mooncake_handoff_events_total\{.*event="([^"]+)".*\} (\S+)$', scrape(url), re.M)
    return Counter({name: int(float(value)) for name, value in rows})


def gauge(url: str, name: str) -> float:
    """Sum a series over its labels; 0 if it is not there."""
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", scrape(url), re.M))


def eventually(probe: Callable[[], Any], *, timeout_s: float = 30.0, what: str = "") -> Any:
    """Ask until the answer is true, or fail."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = probe()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or probe}"
        time.sleep(0.05)


def is_idle(url: str) -> bool:
    """Tell whether an engine runs nothing and every KV block is free."""
    text = scrape(url)
    names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
    values = [float(v) for n in names for v in re.findall(rf"^{n}\{{.*\}} (\S+)$", text, re.M)]
    return len(values) >= len(names) and not any(values)
