"""The shell around ``WatchSession``: what prefill hears, and in which order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from mooncake_plugins.errors import DeadlineExceededError, PeerClosedError
from mooncake_plugins.handoff import HandoffOptions, Ticket, WatchService, WatchState
from mooncake_plugins.handoff import _messages as wire
from mooncake_plugins.wire import Channel
from tests.handoff.harness import PATIENCE_S, wait_until

OPTIONS = HandoffOptions(peer_timeout_s=1.0)


class FakeChannel:
    """Keeps what is sent; ``on_send`` comes before a message counts as sent."""

    def __init__(self) -> None:
        self.sent: list[wire.ToPrefill] = []
        self.on_send: Callable[[wire.ToPrefill], None] = lambda message: None
        self._closed = threading.Event()

    def send(self, message: wire.ToPrefill, *, timeout_s: float) -> None:
        self.on_send(message)
        if not isinstance(message, wire.Ping):
            self.sent.append(message)

    def recv(self, *, timeout_s: float) -> Any:
        if self._closed.wait(timeout_s):
            raise PeerClosedError("closed")
        raise DeadlineExceededError("nothing came")

    def close(self) -> None:
        self._closed.set()

    def kinds(self) -> list[str]:
        return [type(message).__name__ for message in self.sent]


class Service:
    """A watch service over a fake channel that opens when it is told to."""

    def __init__(self) -> None:
        self.channel, self.may_open = FakeChannel(), threading.Event()
        self.service = WatchService("decode", {"layers": 1}, self._connect, OPTIONS)

    def _connect(self, address: str) -> Channel:
        assert self.may_open.wait(PATIENCE_S)
        if address == "nobody:1":
            raise PeerClosedError("nobody answers")
        return cast(Channel, self.channel)

    def watch(self, transfer: str, address: str = "prefill:1") -> None:
        ticket = Ticket(transfer, "p", {"0,0": address}, time.time() + 60)
        self.service.watch(ticket, "v1.x.y", b"prompt", 5)


@pytest.fixture
def s(leak_check: None) -> Iterator[Service]:
    service = Service()
    yield service
    service.may_open.set()
    service.service.close()


def test_what_is_watched_before_the_link_is_open_is_asked_when_it_is(s: Service) -> None:
    s.watch("a")
    s.watch("b")
    assert s.channel.sent == []
    s.may_open.set()
    wait_until(lambda: len(s.channel.sent) == 2, "both to be asked")
    s.watch("c")
    assert [message.transfer for message in s.channel.sent if isinstance(message, wire.Watch)] == ["a", "b", "c"]


def test_prefill_hears_of_a_release_that_came_before_the_link_was_open(s: Service) -> None:
    s.watch("a")
    session = s.service.end("a", release="aborted")
    assert session is not None and session.state is WatchState.ASKING
    s.may_open.set()
    wait_until(lambda: s.channel.kinds() == ["Watch", "Release"], "prefill to hear of it")


def test_a_release_does_not_overtake_its_question_while_the_link_opens(s: Service) -> None:
    def end_while_asking(message: wire.ToPrefill) -> None:
        if isinstance(message, wire.Watch):
            s.service.end("a", release="aborted")

    s.channel.on_send = end_while_asking
    s.watch("a")
    s.may_open.set()
    wait_until(lambda: len(s.channel.sent) == 2, "prefill to hear of it")
    assert s.channel.kinds() == ["Watch", "Release"]


def test_a_transfer_that_was_ended_without_release_says_nothing_more(s: Service) -> None:
    s.may_open.set()
    s.watch("a")
    wait_until(lambda: s.channel.sent, "it to be asked")
    s.service.end("a")
    assert s.channel.kinds() == ["Watch"]
    assert s.service.state("a") is WatchState.DECLINED


def test_who_cannot_be_reached_is_declined_and_tried_again_for_the_next(s: Service) -> None:
    s.may_open.set()
    s.watch("a", "nobody:1")
    wait_until(lambda: s.service.state("a") is WatchState.DECLINED, "it to be declined")
    session = s.service.end("a", release="declined")
    assert session is not None and (session.reason, session.detail) == ("unreachable", "nobody answers")
    s.watch("b", "nobody:1")
    wait_until(lambda: s.service.state("b") is WatchState.DECLINED, "it to be declined")
