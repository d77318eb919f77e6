"""The cluster as the scheduler sees it: engines, what they serve, whether they may be used, and their requests in
flight.

One thread owns a view. ``in_flight`` changes with every request; everything else changes rarely and goes through
`ClusterView`, which keeps the candidate lists of each model ready so that a decision costs no scan over models and
health.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mooncake_conductor.core._facts import Role


@dataclass(slots=True, eq=False)
class Engine:
    """One engine.

    Attributes:
        name: Its URL; unique.
        role: What the operator wants it used for.
        is_usable: Health and fingerprint allow new requests. Changed through `ClusterView.update` only.
        in_flight: Requests sent and not finished. Whoever sends a leg counts it up, and down when it ended.
        instance: Id of the engine process; empty for a coupled engine and before it was described.
        addresses: Where its workers listen for hand-offs, as the engine said.
        models: Names it serves.
    """

    name: str
    role: Role
    is_usable: bool = False
    in_flight: int = 0
    instance: str = ""
    addresses: dict[str, str] = field(default_factory=dict)
    models: frozenset[str] = frozenset()

    @property
    def can_prefill(self) -> bool:
        """It may compute KV for another engine."""
        return self.role in (Role.PREFILL, Role.BOTH)

    @property
    def can_decode(self) -> bool:
        """It may pull KV from another engine and answer."""
        return self.role in (Role.DECODE, Role.BOTH)

    @property
    def can_serve_alone(self) -> bool:
        """It may answer a whole request."""
        return self.role is not Role.PREFILL


class Pools(NamedTuple):
    """Usable engines for one model."""

    prefill: tuple[Engine, ...]
    decode: tuple[Engine, ...]
    alone: tuple[Engine, ...]

    @property
    def has_pair(self) -> bool:
        """The model can be served as it was meant to be: by a pair, or by an engine meant to work alone."""
        return bool(self.prefill and self.decode) or any(e.role in (Role.BOTH, Role.COUPLED) for e in self.alone)


_NOBODY = Pools((), (), ())


class ClusterView:
    """All engines, and for each model those that may be used now. Not thread-safe."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        self.engines: dict[str, Engine] = {}
        for engine in engines:
            if engine.name in self.engines:
                raise ValueError(f"engine {engine.name} is listed twice")
            self.engines[engine.name] = engine
        self._pools: Mapping[str, Pools] = {}
        self._known: frozenset[str] = frozenset()
        self._rebuild()

    def pools(self, model: str) -> Pools | None:
        """Usable engines for a model (perhaps none); None if no engine, usable or not, has ever served it."""
        found = self._pools.get(model)
        if found is None and model in self._known:
            return _NOBODY
        return found

    def update(
        self,
        engine: Engine,
        *,
        is_usable: bool | None = None,
        instance: str | None = None,
        addresses: dict[str, str] | None = None,
        models: frozenset[str] | None = None,
    ) -> None:
        """Change what is known of an engine; fields that are None stay."""
        engine.is_usable = engine.is_usable if is_usable is None else is_usable
        engine.instance = engine.instance if instance is None else instance
        engine.addresses = engine.addresses if addresses is None else addresses
        engine.models = engine.models if models is None else models
        self._rebuild()

    @property
    def models(self) -> frozenset[str]:
        """Models that can be answered now."""
        return frozenset(name for name, pools in self._pools.items() if pools.alone)

    @property
    def has_pair(self) -> bool:
        """At least one model can be served as it was meant to be."""
        return any(pools.has_pair for pools in self._pools.values())

    def _rebuild(self) -> None:
        usable = [engine for engine in self.engines.values() if engine.is_usable]
        names = frozenset(name for engine in usable for name in engine.models)
        self._known |= names
        self._pools = {name: _pools([e for e in usable if name in e.models]) for name in names}


def _pools(engines: list[Engine]) -> Pools:
    return Pools(
        tuple(e for e in engines if e.can_prefill),
        tuple(e for e in engines if e.can_decode),
        tuple(e for e in engines if e.can_serve_alone),
    )
