"""``mooncake up``: check everything, then start and supervise."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from mooncake_plugins.config import SECRET_FILE_VARIABLE, load_secret
from mooncake_plugins.errors import ConfigError, PluginError, UnknownProviderError
from mooncake_plugins.launch import (
    Deployment,
    LaunchProfile,
    RunDirectory,
    check_model,
    check_port_is_free,
    plan,
    supervise,
    visible_gpus,
)
from mooncake_plugins.plugins import PluginRegistry, default_registry

HOOK = "mooncake_launch_profiles"
CONDUCTOR = "conductor"


@click.command("up")
@click.argument("model")
@click.option("--engine", default="vllm", show_default=True, help="Which engine serves the model.")
@click.option("--prefill", type=click.IntRange(min=1), default=1, show_default=True, help="Number of prefill engines.")
@click.option("--decode", type=click.IntRange(min=1), default=1, show_default=True, help="Number of decode engines.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where the endpoint listens.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Its port; 0 picks a free one."
)
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="New folder for logs  [default: under ~/.local/state/mooncake]"
)
@click.option(
    "--ready-timeout",
    type=click.FloatRange(min=1),
    default=900,
    show_default=True,
    help="Seconds a part may take to get ready.",
)
@click.option(
    "--grace", type=click.FloatRange(min=0), default=20, show_default=True, help="Seconds from SIGTERM to SIGKILL."
)
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ENGINE ARGS...]")
def up(
    model: str,
    engine: str,
    prefill: int,
    decode: int,
    host: str,
    port: int,
    run_dir: Path | None,
    ready_timeout: float,
    grace: float,
    engine_args: tuple[str, ...],
) -> int:
    """Start prefill engines, decode engines and the Conductor for MODEL on this host, and supervise them.

    MODEL is a local folder or a name on a model hub. What follows -- is handed to every engine. Nothing is restarted:
    when a part dies, everything is stopped, and the end of its log is shown. Ctrl-C stops everything; pressed again, it
    kills.
    """
    if engine_args and not engine_args[0].startswith("-"):
        raise click.UsageError(
            f"unexpected argument {engine_args[0]!r}; arguments for the engines come after -- and begin with a dash"
        )
    registry = default_registry()
    check_engine(registry, engine)
    model = check_model(model)
    engine_profile, conductor_profile = load_profile(registry, engine), load_profile(registry, CONDUCTOR)
    check_port_is_free(host, port)
    gpus = visible_gpus(os.environ)
    with run_directory(run_dir) as folder:
        deployment = plan(
            model,
            prefill=prefill,
            decode=decode,
            host=host,
            port=port,
            run_directory=folder,
            secret_file=secret_file(folder),
            gpus=gpus,
            extra_args=engine_args,
        )
        deployment.check(engine_profile, conductor_profile)
        return run(deployment, engine_profile, conductor_profile, folder, ready_timeout_s=ready_timeout, grace_s=grace)


def check_engine(registry: PluginRegistry, engine: str) -> None:
    """Refuse an engine that nobody offers, with the list of those that are.

    Raises:
        ConfigError: As said.
    """
    engines = sorted(set(registry.providers(HOOK)) - {CONDUCTOR})
    if engine not in engines:
        raise ConfigError("--engine", engine, f"known engines: {', '.join(engines) or 'none'} (see: mooncake plugins)")


def load_profile(registry: PluginRegistry, name: str) -> LaunchProfile:
    """Make the launch profile of a name.

    Raises:
        UnknownProviderError: Nobody offers it; the known names are listed.
        PluginError: What is offered is no launch profile.
        ProviderUnavailableError: It cannot be imported.
    """
    providers = registry.providers(HOOK)
    if name not in providers:
        raise UnknownProviderError(HOOK, name, tuple(sorted(providers)))
    profile = providers[name].load()()
    if not isinstance(profile, LaunchProfile):
        raise PluginError(f"{providers[name].target} of plugin {providers[name].plugin!r} is no LaunchProfile")
    return profile


@contextlib.contextmanager
def run_directory(path: Path | None) -> Iterator[RunDirectory]:
    """The folder of this run; its secret is removed afterwards, and the folder too if nothing was written to it."""
    folder = RunDirectory(path if path is not None else RunDirectory.default_path(os.environ))
    try:
        yield folder
    finally:
        folder.close()


def secret_file(folder: RunDirectory) -> Path:
    """The cluster's secret if one is set (engines on other hosts may join), else a fresh one for this run."""
    if load_secret(os.environ) is not None:
        return Path(os.environ[SECRET_FILE_VARIABLE]).resolve()
    return folder.make_secret()


def run(
    deployment: Deployment,
    engine_profile: LaunchProfile,
    conductor_profile: LaunchProfile,
    folder: RunDirectory,
    *,
    ready_timeout_s: float,
    grace_s: float,
) -> int:
    """Start and supervise; the exit code."""
    process_groups: dict[str, int] = {}

    def spawned(name: str, process_group: int) -> None:
        process_groups[name] = process_group
        folder.describe(deployment.describe(process_groups))

    click.echo(f"run directory: {folder.path}")
    return supervise(
        deployment.parts(engine_profile, conductor_profile),
        say=click.echo,
        all_ready=_announcement(deployment),
        spawned=spawned,
        ready_timeout_s=ready_timeout_s,
        grace_s=grace_s,
    )


def _announcement(deployment: Deployment) -> Callable[[], None]:
    return lambda: click.echo(f"ready: {deployment.endpoint}/v1 (Ctrl-C stops everything)")
