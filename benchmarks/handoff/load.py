"""What the hand-off's benchmark does as a client: streams answers and keeps the time of every piece."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 120.0


def random_prompt(tokens: int, seed: object) -> list[int]:
    """Draw a prompt that is in no cache."""
    draw = random.Random(str(seed))
    return [draw.randrange(3, 290) for _ in range(tokens)]


def arrivals(url: str, body: Mapping[str, Any]) -> list[float]:
    """Stream a completion; return the seconds from sending the request to each piece of the answer."""
    parts = urlsplit(url)
    data = json.dumps({"model": "bench", "temperature": 0, "ignore_eos": True, **body, "stream": True})
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        begun = time.perf_counter()
        connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{url} answered {answer.status}: {answer.read()!r}")
        pieces = (line for line in answer if line.startswith(b"data: {"))
        return [time.perf_counter() - begun for _ in pieces]
    finally:
        connection.close()


def time_to_first_token(url: str, prompt: Sequence[int], *, tokens: int = 4) -> float:
    """Return seconds from sending a request to its first piece."""
    return arrivals(url, {"prompt": prompt, "max_tokens": tokens})[0]


def gaps(url: str, prompt: Sequence[int], tokens: int) -> list[float]:
    """Stream one long answer; return the seconds between its pieces, without the first few."""
    times = arrivals(url, {"prompt": prompt, "max_tokens": tokens})[8:]
    return [late - early for early, late in pairwise(times)]


@contextmanager
def in_background(work: Callable[[int], None]) -> Any:
    """Call ``work(0)``, ``work(1)``, ... in a thread until the block ends; an error in it is raised here."""
    stop, errors = threading.Event(), []

    def run() -> None:
        number = 0
        try:
            while not stop.is_set():
                work(number)
                number += 1
        except Exception as error:  # noqa: BLE001  (handed over to the main thread)
            errors.append(error)

    thread = threading.Thread(target=run, name="background-load")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(TIMEOUT_S)
    if errors:
        raise errors[0]


def quantile(values: Sequence[float], q: float) -> float:
    """Return the value below which a share ``q`` of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
