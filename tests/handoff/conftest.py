"""Workers for the service tests; hypothesis without its own time limit (a busy machine is no failure)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import settings

from mooncake_plugins.testing import leak_check
from tests.handoff.harness import FAULTS, DecodeSide, Faults, PrefillSide

__all__ = ["leak_check"]

settings.register_profile("mooncake", deadline=None)
settings.load_profile("mooncake")

MakePrefill = Callable[..., PrefillSide]
MakeDecode = Callable[..., DecodeSide]


@pytest.fixture
def stack(leak_check: None) -> Iterator[ExitStack]:
    """Closes what a test opened, last first; then nothing may be left."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make_prefill(stack: ExitStack) -> MakePrefill:
    """Make prefill workers that end with the test."""

    def make(**arguments: Any) -> PrefillSide:
        side = PrefillSide(**arguments)
        stack.callback(side.close)
        return side

    return make


@pytest.fixture
def make_decode(stack: ExitStack) -> MakeDecode:
    """Make decode workers that end with the test."""

    def make(**arguments: Any) -> DecodeSide:
        side = DecodeSide(**arguments)
        stack.callback(side.close)
        return side

    return make


@pytest.fixture
def prefill(make_prefill: MakePrefill) -> PrefillSide:
    return make_prefill()


@pytest.fixture
def decode(make_decode: MakeDecode) -> DecodeSide:
    return make_decode()


@pytest.fixture
def faults(stack: ExitStack) -> Iterator[Faults]:
    """What the ``faulty`` transport does; it does nothing again afterwards."""
    yield FAULTS
    FAULTS.before = FAULTS.after = lambda work: None
