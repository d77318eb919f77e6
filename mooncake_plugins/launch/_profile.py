"""What a part is, and what a launch profile must say about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One part of a deployment, before it is started.

    Args:
        name: Unique in the deployment, as ``prefill-0``; also the name of its log.
        role: ``prefill``, ``decode``, ``both`` or ``conductor``.
        model: As given by the user: a local path or a name on a model hub.
        host: Where its HTTP server listens.
        port: The port of its HTTP server; free a moment ago.
        log_path: Where its standard output and error go.
        run_dir: The folder of this run, private to this user; the part may keep files in it.
        secret_file: The cluster secret; the supervisor also puts it in ``MOONCAKE_SECRET_FILE`` of the part.
        extra_args: What the user wrote after ``--``, for engines.
        gpus: The devices it may use, as ``CUDA_VISIBLE_DEVICES`` names them (the supervisor sets that variable); None:
            no GPU was found.
        peers: For the Conductor, the engines.
    """

    name: str
    role: str
    model: str
    host: str
    port: int
    log_path: Path
    run_dir: Path
    secret_file: Path
    extra_args: tuple[str, ...] = ()
    gpus: tuple[str, ...] | None = None
    peers: tuple[PartSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute.

    Args:
        argv: The program (looked up in ``PATH``) and its arguments; no shell is involved.
        env: Variables to set on top of the supervisor's own environment.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


class LaunchProfile(ABC):
    """How one kind of part is started. Made without arguments; one object serves all parts of its kind."""

    name: str

    @abstractmethod
    def check(self, spec: PartSpec) -> None:
        """Find out everything that can be known before a process is started.

        Raises:
            LaunchError: What is to be started is not installed or too old.
            ConfigError: A setting, model or extra argument cannot be used.

        Blocking: seconds at most. Starts nothing, writes nothing.
        """

    @abstractmethod
    def command(self, spec: PartSpec) -> Command:
        """What to execute for this part. Pure, apart from files it may write to ``spec.run_dir``."""

    @abstractmethod
    def ready_url(self, spec: PartSpec) -> str:
        """An ``http://`` URL that answers 200 as soon as the part can serve."""
