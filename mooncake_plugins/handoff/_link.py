"""A decode instance's channel to one prefill worker: a thread that connects, listens and keeps it alive."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from mooncake_plugins.errors import DeadlineExceededError, MooncakeError
from mooncake_plugins.handoff import _messages as wire
from mooncake_plugins.wire import Channel

log = logging.getLogger(__name__)

_SEND_TIMEOUT_S = 1.0


class LinkEvents(Protocol):
    """Who wants to know what happens on a link. Called in the link's thread."""

    def link_up(self, link: Link) -> None:
        """The channel is open."""
        ...

    def link_message(self, link: Link, message: wire.ToDecode) -> None:
        """P sent something."""
        ...

    def link_lost(self, link: Link, reason: str) -> None:
        """P cannot be reached, left or fell silent. Comes exactly once, last."""
        ...


class Link:
    """A channel to the prefill worker at ``address``; opens itself in a thread of its own.

    Args:
        address: ``host:port``.
        connect: Opens the channel (blocking, with its own deadline).
        events: Told what happens.
        peer_timeout_s: Silence after which P is taken for dead.

    Thread-safe.
    """

    def __init__(
        self, address: str, connect: Callable[[str], Channel], events: LinkEvents, *, peer_timeout_s: float
    ) -> None:
        self.address = address
        self._connect, self._events, self._peer_timeout_s = connect, events, peer_timeout_s
        self._channel: Channel | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=f"mooncake-link-{address}", daemon=True)
        self._thread.start()

    def send(self, message: wire.ToPrefill) -> None:
        """Send a message; a failure is reported through ``link_lost``."""
        channel = self._channel
        if channel is None:
            return
        try:
            channel.send(message, timeout_s=_SEND_TIMEOUT_S)
        except MooncakeError as error:
            log.debug("cannot send to prefill address=%s: %s", self.address, error)
            channel.close()

    def close(self, *, join: bool = True) -> None:
        """Close the channel and end the thread. Idempotent; not to be called in the link's own thread with ``join``."""
        self._is_closing = True
        if self._channel is not None:
            self._channel.close()
        if join:
            self._thread.join(timeout=self._peer_timeout_s + 1.0)

    def _run(self) -> None:
        try:
            self._channel = self._connect(self.address)
            self._events.link_up(self)
            reason = self._listen(self._channel)
        except MooncakeError as error:
            reason = str(error)
        except OSError as error:
            reason = f"cannot connect to {self.address}: {error}"
        except Exception as error:
            log.exception("a hand-off link broke address=%s", self.address)
            reason = f"internal error: {error!r}"
        finally:
            if self._channel is not None:
                self._channel.close()
        self._events.link_lost(self, "closed here" if self._is_closing else reason)

    def _listen(self, channel: Channel) -> str:
        """Hand messages on until P is silent for too long; returns why it ended."""
        interval = self._peer_timeout_s / 4
        heard = pinged = time.monotonic()
        while not self._is_closing:
            try:
                message = channel.recv(timeout_s=interval)
                heard = time.monotonic()
                if not isinstance(message, wire.Pong):
                    self._events.link_message(self, message)
            except DeadlineExceededError:
                pass
            now = time.monotonic()
            if now - heard > self._peer_timeout_s:
                return f"prefill at {self.address} has been silent for {now - heard:.1f} s"
            if now - pinged >= interval:
                pinged = now
                self.send(wire.Ping(0))
        return "closed here"
