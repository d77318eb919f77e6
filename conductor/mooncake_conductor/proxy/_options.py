"""Settings of the proxy, with their defaults and units."""

from __future__ import annotations

from dataclasses import dataclass

from mooncake_plugins.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """Limits and deadlines. Section ``conductor``, environment ``MOONCAKE_CONDUCTOR_…``.

    Attributes:
        max_body_bytes: Larger request bodies are refused before they are read.
        max_header_bytes: Larger request heads are refused.
        max_connections: Client connections at once; further ones are refused.
        receive_s: A request's head must arrive within a tenth of this, all of it within this.
        keep_alive_s: Client connections without a request are closed after this.
        stall_s: A client that takes no byte of its answer for this long is dropped.
        connect_s: To connect with an engine.
        first_byte_s: From the request to the first byte of a streamed answer; covers queueing and prefill of long
            prompts.
        between_bytes_s: Between two pieces of an answer that has begun.
        total_s: For the whole answer, and to the first byte of one that is not streamed.
        retries: Further attempts on other engines before the first byte.
        pool_connections: Idle connections kept per engine.
        pool_idle_s: Idle connections are closed after this. Below the engines' own limit (vLLM: 5 s), so that an idle
            connection which the engine closes is a hint that it was restarted.
        ticket_s: Life of a hand-off ticket: the time a request may wait in the prefill engine's queue.
        startup_s: Time in which all engines must answer at start.
        health_interval_s: Between two health probes of an engine.
        health_timeout_s: For one health probe.
        redescribe_s: An engine that was refused, or whose idle connections end early, is described again this often.
        describe_timeout_s: For one describe probe, which waits in the engine's queue like a request.
        grace_s: At stop, for requests in flight.
    """

    max_body_bytes: int = 64 << 20
    max_header_bytes: int = 64 << 10
    max_connections: int = 8192
    receive_s: float = 300.0
    keep_alive_s: float = 75.0
    stall_s: float = 300.0
    connect_s: float = 5.0
    first_byte_s: float = 600.0
    between_bytes_s: float = 120.0
    total_s: float = 3600.0
    retries: int = 2
    pool_connections: int = 1024
    pool_idle_s: float = 4.0
    ticket_s: float = 600.0
    startup_s: float = 600.0
    health_interval_s: float = 2.0
    health_timeout_s: float = 5.0
    redescribe_s: float = 10.0
    describe_timeout_s: float = 60.0
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value < 0 or (value == 0 and name not in ("retries", "grace_s", "pool_connections")):
                raise ConfigError(f"conductor {name}", value, "give a number above zero")
