"""The one module that imports uvloop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from mooncake_conductor.proxy._httptools import EXTRA_REMEDY
from mooncake_plugins.errors import ProviderUnavailableError

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a new uvloop event loop.

    Raises:
        ProviderUnavailableError: uvloop is not installed.
    """
    try:
        import uvloop
    except ImportError as error:
        main.close()
        raise ProviderUnavailableError("conductor", "uvloop", "it is not installed", EXTRA_REMEDY) from error
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
