"""Who belongs to the cluster: probes each engine, has it describe itself, and keeps the view up to date.

The decisions are `HealthMachine`'s; this is the shell that performs them. One task per engine, owned by the task group
that runs `watch`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from mooncake_conductor.core import (
    Action,
    ClusterView,
    Described,
    DescribeFailed,
    Engine,
    Event,
    Health,
    HealthMachine,
    HealthOptions,
    Probed,
    Refused,
    Role,
    TrafficFailed,
    Verify,
)
from mooncake_conductor.dialects import EngineDialect
from mooncake_conductor.proxy._fetch import NoAnswerError, fetch
from mooncake_conductor.proxy._options import ProxyOptions
from mooncake_conductor.proxy._pool import EnginePool
from mooncake_plugins.errors import ConductorError, FingerprintError, MooncakeError
from mooncake_plugins.handoff import EngineDescription
from mooncake_plugins.kv import fingerprint_differences

logger = logging.getLogger(__name__)

_JOINING_INTERVAL_S = 0.25
_MIN_INTERVAL_S = 0.02
_LIST_MODELS_S = 30.0


class Member:
    """One engine and everything that is known of it."""

    def __init__(self, engine: Engine, pool: EnginePool, health: HealthOptions) -> None:
        self.engine, self.pool = engine, pool
        self.machine = HealthMachine(health)
        self.models: dict[str, msgspec.Raw] = {}
        self.listed_at = float("-inf")
        self.description: EngineDescription | None = None
        self.error: MooncakeError | None = None
        self.wake = asyncio.Event()
        self.settled = asyncio.Event()


class Membership:
    """All members. Used by one event loop."""

    def __init__(
        self, view: ClusterView, pools: dict[Engine, EnginePool], dialect: EngineDialect, options: ProxyOptions
    ) -> None:
        self._view, self._dialect, self._options = view, dialect, options
        self._now = asyncio.get_running_loop().time
        health = HealthOptions(redescribe_s=options.redescribe_s)
        self.members = {engine: Member(engine, pool, health) for engine, pool in pools.items()}
        for member in self.members.values():
            member.pool.on_idle_lost = partial(self._idle_lost, member)

    async def watch(self, member: Member) -> None:
        """Probe one engine for ever."""
        while True:
            try:
                await self._probe(member)
            except Exception:  # a dialect of somebody else may raise anything; the other engines go on
                logger.exception("probe failed engine=%s", member.engine.name)
            await asyncio.sleep(_MIN_INTERVAL_S)  # however often traffic asks for a probe
            is_joining = member.machine.state is Health.JOINING
            interval = (
                min(_JOINING_INTERVAL_S, self._options.health_interval_s)
                if is_joining
                else self._options.health_interval_s
            )
            try:
                async with asyncio.timeout(interval):
                    await member.wake.wait()
            except TimeoutError:
                pass
            member.wake.clear()

    async def ready(self) -> None:
        """Wait until every engine has described itself, at most ``startup_s``.

        Raises:
            FingerprintError: Engines would compute different KV; both values are named.
            ConductorError: An engine does not fit, or too few answered to serve any model.
        """
        try:
            async with asyncio.timeout(self._options.startup_s):
                await self._settle()
        except TimeoutError:
            missing = [m for m in self.members.values() if not m.settled.is_set()]
            listed = "; ".join(f"{m.engine.name}: {m.machine.reason}" for m in missing)
            if not self._view.has_pair:
                raise ConductorError(f"not ready after {self._options.startup_s:g} s: {listed}") from None
            logger.warning("starting without engines=%s", listed)

    async def _settle(self) -> None:
        """As soon as one engine is refused there is no need to wait for the others."""
        waiting = {asyncio.create_task(m.settled.wait()): m for m in self.members.values()}
        try:
            pending = set(waiting)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for error in [waiting[task].error for task in done]:
                    if error is not None:
                        raise error
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def traffic_failed(self, engine: Engine, event: TrafficFailed) -> None:
        """A request failed on an engine."""
        self._handle(self.members[engine], event)

    def _idle_lost(self, member: Member) -> None:
        self._handle(member, Verify())

    def list_models(self) -> bytes:
        """Body of ``GET /v1/models``: models that can be answered now, as the answering engines describe them."""
        wanted, found = self._view.models, dict[str, msgspec.Raw]()
        for member in self.members.values():
            if member.engine.is_usable and member.engine.can_serve_alone:
                found |= {name: raw for name, raw in member.models.items() if name in wanted and name not in found}
        return msgspec.json.encode({"object": "list", "data": list(found.values())})

    def state(self) -> list[dict[str, Any]]:
        """What the console shows of each engine."""
        return [
            {
                "url": m.engine.name,
                "role": m.engine.role.value,
                "health": m.machine.state.value,
                "reason": m.machine.reason,
                "in_flight": m.engine.in_flight,
                "instance": m.engine.instance,
                "addresses": m.engine.addresses,
                "models": sorted(m.engine.models),
                "connections": len(m.pool.links),
                "fingerprint": dict(m.description.fingerprint) if m.description else {},
            }
            for m in self.members.values()
        ]

    # --- probing -------------------------------------------------------------------------------------------------

    def _handle(self, member: Member, event: Event) -> list[Action]:
        """Feed the machine; perform what needs no waiting, return the rest."""
        before = member.machine.state
        actions = member.machine.handle(event, self._now())
        after, engine = member.machine.state, member.engine
        if after is not before:
            logger.info("engine=%s %s -> %s %s", engine.name, before.value, after.value, member.machine.reason)
        if Action.AVOID in actions:
            self._view.update(engine, is_usable=False)
        if Action.USE in actions:
            self._view.update(engine, is_usable=True)
        if Action.PROBE in actions:
            member.wake.set()
        if after in (Health.UP, Health.REFUSED):
            member.settled.set()
        return actions

    async def _probe(self, member: Member) -> None:
        try:
            status, _ = await fetch(member.pool, self._dialect.health, timeout_s=self._options.health_timeout_s)
            event = Probed(status == 200, f"health probe answered with HTTP {status}")
        except NoAnswerError as error:
            event = Probed(False, str(error))
        if Action.DESCRIBE in self._handle(member, event):
            self._handle(member, await self._describe(member))
        elif member.engine.is_usable and self._now() - member.listed_at > _LIST_MODELS_S:
            await self._refresh_models(member)

    async def _refresh_models(self, member: Member) -> None:
        try:
            await self._list_models(member)
        except ConductorError as error:
            logger.warning("models not refreshed engine=%s reason=%s", member.engine.name, error)
            member.listed_at = self._now()

    async def _describe(self, member: Member) -> Event:
        """Have an engine say what it is, and check that it fits."""
        member.error = None
        try:
            await self._list_models(member)
            if member.engine.role is not Role.COUPLED:
                description = await self._ask(member)
                self._check(member, description)
                member.description = description
                self._view.update(member.engine, instance=description.instance, addresses=dict(description.addresses))
        except NoAnswerError as error:
            return DescribeFailed(str(error))
        except MooncakeError as error:
            member.error = (
                error if isinstance(error, FingerprintError) else ConductorError(f"{member.engine.name}: {error}")
            )
            logger.error("engine refused engine=%s reason=%s", member.engine.name, error)
            return Refused(str(error))
        return Described()

    async def _list_models(self, member: Member) -> None:
        status, body = await fetch(member.pool, self._dialect.models, timeout_s=self._options.health_timeout_s)
        if status >= 500:
            raise NoAnswerError(f"GET /v1/models was answered with HTTP {status}")
        member.models = self._dialect.read_models(status, body)
        member.listed_at = self._now()
        self._view.update(member.engine, models=frozenset(member.models))

    async def _ask(self, member: Member) -> EngineDescription:
        model = next(iter(member.models), None)
        if model is None:
            raise NoAnswerError("it serves no model yet")
        status, body = await fetch(
            member.pool, self._dialect.describe(model), timeout_s=self._options.describe_timeout_s
        )
        if status >= 500:
            raise NoAnswerError(f"the describe probe was answered with HTTP {status}")
        return self._dialect.read_description(status, body)

    def _check(self, member: Member, description: EngineDescription) -> None:
        wanted = member.engine.role.value
        if description.role not in (wanted, "both"):
            raise ConductorError(
                f"it was given as --{wanted}, but runs with --kv-role {description.role}; change one of the two"
            )
        for other in self._peers(member):
            if other.description is not None:
                different = fingerprint_differences(other.description.fingerprint, description.fingerprint)
                if different:
                    raise FingerprintError(dict(different), f"at {other.engine.name}", f"at {member.engine.name}")

    def _peers(self, member: Member) -> Sequence[Member]:
        """Members whose word counts; not those that are away, so that restarting all engines can change the model."""
        return [other for other in self.members.values() if other is not member and other.machine.state is Health.UP]
