"""What the Conductor must know of a kind of engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import ClassVar, NamedTuple

import msgspec

from mooncake_conductor.core import RequestFacts
from mooncake_conductor.dialects._body import Body
from mooncake_plugins.handoff import EngineDescription


class Endpoint(Enum):
    """The endpoints whose requests are scheduled; the value is the path."""

    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"


class Probe(NamedTuple):
    """A request that the Conductor makes on its own behalf."""

    method: str
    path: str
    body: bytes = b""


class EngineDialect(ABC):
    """One kind of engine behind the OpenAI API. Stateless and pure: no I/O."""

    name: ClassVar[str]
    health: ClassVar[Probe] = Probe("GET", "/health")
    models: ClassVar[Probe] = Probe("GET", "/v1/models")

    @abstractmethod
    def facts(self, endpoint: Endpoint, body: Body) -> RequestFacts:
        """Read what the scheduler needs.

        Raises:
            BodyError: A field that the Conductor itself needs is absent or of the wrong type.
        """

    @abstractmethod
    def prefill_leg(self, endpoint: Endpoint, body: Body, ticket: str) -> bytes:
        """Body of the request that computes the prompt's KV, and hands it to whoever has the ticket."""

    @abstractmethod
    def decode_leg(self, endpoint: Endpoint, body: Body, ticket: str) -> bytes:
        """Body of the request that pulls the prompt's KV with the ticket and answers."""

    @abstractmethod
    def whole(self, endpoint: Endpoint, body: Body) -> bytes:
        """Body of the request for an engine that serves it alone. What only the Conductor may set is removed."""

    @abstractmethod
    def describe(self, model: str) -> Probe:
        """Request that makes an engine with our connector say what it is."""

    @abstractmethod
    def read_description(self, status: int, body: bytes) -> EngineDescription:
        """Decode the answer to `describe`.

        Raises:
            ConductorError: The engine has no connector of ours, or answered nonsense; the message says which.
        """

    @abstractmethod
    def read_models(self, status: int, body: bytes) -> dict[str, msgspec.Raw]:
        """Decode the answer to `models`: name -> its entry as raw JSON.

        Raises:
            ConductorError: The answer is not a list of models.
        """
