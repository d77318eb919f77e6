"""The hooks of the core.

All of them *offer*: they take no arguments, are called once per process when a registry first needs them, and return a
list of `Provider`. A hook is never called per request slice or block. ``docs/hooks.md`` has one section per hook, with
an example.
"""

from __future__ import annotations

from mooncake_plugins.plugins._markers import hookspec
from mooncake_plugins.plugins._provider import Provider


@hookspec
def mooncake_transports() -> list[Provider]:  # type: ignore[empty-body]
    """Offer ways to move bytes between segments; the name is the URI scheme.

    The target is a class that implements ``mooncake_plugins.transports.Transport``.
    """


@hookspec
def mooncake_metadata_backends() -> list[Provider]:  # type: ignore[empty-body]
    """Offer ways to resolve a segment name to a peer.

    The target is a class that implements ``mooncake_plugins.metadata.MetadataBackend``.
    """


@hookspec
def mooncake_commands() -> list[Provider]:  # type: ignore[empty-body]
    """Offer sub-commands of ``mooncake``.

    The target is a ``click.Command``. A name of several words joins a group: ``"trace replay"`` becomes ``mooncake
    trace replay``.
    """


@hookspec
def mooncake_doctor_checks() -> list[Provider]:  # type: ignore[empty-body]
    """Offer checks of this host for ``mooncake doctor``.

    The target is a callable without arguments that returns or yields `CheckResult`. It must not change anything and
    must end within seconds.
    """


@hookspec
def mooncake_launch_profiles() -> list[Provider]:  # type: ignore[empty-body]
    """Offer ways to start an engine (or the Conductor) for ``mooncake up``; the name is what ``--engine`` takes.

    The target is a class that implements ``mooncake_plugins.launch.LaunchProfile`` and takes no arguments.
    """


@hookspec
def mooncake_engine_dialects() -> list[Provider]:  # type: ignore[empty-body]
    """Offer how the Conductor talks to a kind of engine over HTTP; the name is the engine's.

    The target is a class that implements the dialect interface of ``mooncake_conductor.dialects``.
    """


@hookspec
def mooncake_scheduling_policies() -> list[Provider]:  # type: ignore[empty-body]
    """Offer how the Conductor chooses the prefill and decode instance of a request.

    The target is a class that implements the policy interface of ``mooncake_conductor.core``.
    """
