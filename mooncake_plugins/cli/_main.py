"""The outermost command: options that all share, and how errors end."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import click

import mooncake_plugins
from mooncake_plugins.cli._lazy import LazyGroup
from mooncake_plugins.errors import ConfigError, MooncakeError
from mooncake_plugins.plugins import default_registry

DEBUG_VARIABLE = "MOONCAKE_DEBUG"
USAGE, FAILURE, INTERRUPTED = 2, 1, 130
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def _top(ctx: click.Context, verbose: int) -> None:
    logging.basicConfig(level=_LEVELS[min(verbose, 2)], format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _command() -> LazyGroup:
    group = LazyGroup(
        default_registry,
        name="mooncake",
        callback=click.pass_context(_top),
        invoke_without_command=True,
        help="Serve one model with prefill and decode on separate engines, and move the KVCache between them.",
        params=[click.Option(["-v", "--verbose"], count=True, help="Log more; twice for details.")],
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    version = click.version_option(mooncake_plugins.__version__, prog_name="mooncake", message="%(prog)s %(version)s")
    return version(group)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``mooncake`` with the given arguments (default: those of this process), and exit.

    An error of ours, or a wrong use, is one line on standard error; with ``MOONCAKE_DEBUG=1`` the traceback is shown
    instead.

    Raises:
        SystemExit: Always. 0: done; 1: it failed; 2: wrong use or a setting that cannot be used; 130: interrupted.
    """
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        result = _command().main(arguments, prog_name="mooncake", standalone_mode=False)
    except click.ClickException as error:
        return _say(error.format_message() + _hint(error), error.exit_code)
    except MooncakeError as error:
        if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
            raise
        return _say(str(error), USAGE if isinstance(error, ConfigError) else FAILURE)
    except (click.Abort, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has had enough; keep the interpreter from flushing into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    return result if isinstance(result, int) else 0


def _say(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def _hint(error: click.ClickException) -> str:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f" (see: {error.ctx.command_path} --help)"
    return ""
