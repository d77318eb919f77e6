"""The peer process stops where it is told to, and says what went wrong."""

from __future__ import annotations

import time

import pytest

from mooncake_plugins.testing import PeerProcess, wait_until


def test_freeze_and_resume() -> None:
    with PeerProcess(transports=["tcp"]) as peer:
        peer.freeze()
        peer.begin("metrics")
        with pytest.raises(AssertionError, match="gave no answer"):
            peer.answer(timeout_s=0.1)
        peer.resume()
        assert "batches_done" in peer.answer()


def test_a_failing_command_is_an_assertion_error() -> None:
    with PeerProcess(transports=["tcp"]) as peer, pytest.raises(AssertionError, match="OutOfBoundsError"):
        peer.ask("grant", offset=0, length=1, deadline_s=1)


def test_a_dead_peer_is_noticed() -> None:
    with PeerProcess(transports=["tcp"]) as peer:
        peer.begin("metrics")
        peer.answer()
        peer.kill()
        with pytest.raises(AssertionError, match="ended"):
            peer.answer()


def test_wait_until_says_what_it_waited_for() -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match="pigs to fly"):
        wait_until(lambda: False, "pigs to fly", timeout_s=0.05)
    assert time.monotonic() - started < 5
