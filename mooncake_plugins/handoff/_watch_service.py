"""D's side of the hand-off in the scheduler process: the shell around ``WatchSession``.

The scheduler asks ``state`` in every step and never waits; the links' threads bring the answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mooncake_plugins.handoff import _messages as wire
from mooncake_plugins.handoff._link import Link
from mooncake_plugins.handoff._options import HandoffOptions
from mooncake_plugins.handoff._ticket import Ticket
from mooncake_plugins.handoff._watch import WatchSession, WatchState
from mooncake_plugins.kv import Fingerprint
from mooncake_plugins.wire import Channel

# Rank 0 speaks for its engine: all workers of an engine run the same steps.
_SPOKESMAN = "0,0"


class WatchService:
    """Asks prefill instances whether a request's prefill has begun.

    Args:
        instance: This engine's instance id.
        fingerprint: What this engine's KV is.
        connect: Opens a ``handoff`` channel to an address (blocking, with its own deadline).
        options: Timeouts.

    Thread-safe; no method blocks but ``close``. Owns its links.
    """

    def __init__(
        self, instance: str, fingerprint: Fingerprint, connect: Callable[[str], Channel], options: HandoffOptions
    ) -> None:
        self._instance, self._fingerprint, self._connect, self._options = instance, fingerprint, connect, options
        self._lock = threading.Lock()
        self._sessions: dict[str, tuple[WatchSession, Link]] = {}
        self._links: dict[str, Link] = {}
        # What prefill must hear, in this order, once a link is open. Releases, too: else it would hold blocks for
        # nobody until its lease ends. A link that is not in here is open, and takes messages at once.
        self._waiting: dict[Link, list[wire.ToPrefill]] = {}

    def watch(self, ticket: Ticket, text: str, prompt: bytes, tokens: int) -> None:
        """Begin to ask about a transfer."""
        deadline = time.monotonic() + min(self._options.watch_timeout_s, max(0.0, ticket.expires_at - time.time()))
        request = wire.Watch(ticket.id, text, self._instance, prompt, tokens, dict(self._fingerprint))
        address = ticket.addresses.get(_SPOKESMAN, "")
        with self._lock:
            if address not in self._links:
                timeout_s = self._options.peer_timeout_s
                link = Link(address, self._connect, self, peer_timeout_s=timeout_s)
                self._links[address], self._waiting[link] = link, []
            link = self._links[address]
            self._sessions[ticket.id] = (WatchSession(ticket.id, deadline), link)
        self._send(link, request)

    def state(self, transfer: str) -> WatchState:
        """Return what is known; an unknown transfer is DECLINED."""
        with self._lock:
            entry = self._sessions.get(transfer)
            if entry is None:
                return WatchState.DECLINED
            entry[0].tick(time.monotonic())
            return entry[0].state

    def end(self, transfer: str, *, release: str = "") -> WatchSession | None:
        """Forget a transfer; with ``release`` (a reason) prefill hears of it once it can be reached."""
        with self._lock:
            entry = self._sessions.pop(transfer, None)
        if entry is None:
            return None
        session, link = entry
        if release:
            self._send(link, wire.Release(transfer, release))
        return session

    def _send(self, link: Link, message: wire.ToPrefill) -> None:
        with self._lock:
            if link in self._waiting:
                self._waiting[link].append(message)
                return
        link.send(message)

    def close(self) -> None:
        """End the links. Idempotent."""
        with self._lock:
            links, self._links = list(self._links.values()), {}
        for link in links:
            link.close()

    # --- called by the links' threads --------------------------------------------------------------

    def link_up(self, link: Link) -> None:
        while True:
            with self._lock:
                waiting = self._waiting.get(link)
                if not waiting:  # only now, so that nothing overtakes what waited
                    self._waiting.pop(link, None)
                    return
                self._waiting[link] = []
            for message in waiting:
                link.send(message)

    def link_message(self, link: Link, message: wire.ToDecode) -> None:
        with self._lock:
            entry = None if isinstance(message, wire.Pong) else self._sessions.get(message.transfer)
            if entry is not None:
                entry[0].answered(message)

    def link_lost(self, link: Link, reason: str) -> None:
        with self._lock:
            self._waiting.pop(link, None)
            if self._links.get(link.address) is link:
                del self._links[link.address]
            for session, its in self._sessions.values():
                if its is link and session.state is WatchState.ASKING:
                    session.decline("unreachable", reason)
