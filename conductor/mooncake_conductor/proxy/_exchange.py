"""One client request, from the decision to the last byte: its legs, their failures, its deadlines.

Nothing is sent to the client before the first byte of an answer's *body*: engines send their head before they have
computed anything, and as long as the client has nothing, another pair of engines can take over unseen. After that byte
there is no way back: an answer that breaks is ended with an error event (a stream at a chunk's end) or by closing the
connection, so that it never looks complete.

    placed ──first body byte──▶ committed ──last byte──▶ answered ──prefill leg ended──▶ over
      │ └──leg failed: placed again with other engines and a fresh ticket (`retries` times)
      └──nobody left, deadline, 4xx of either leg──▶ answered

This object is called by the loop's callbacks and owns no task and no socket. It is over exactly once (`_end`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mooncake_conductor.core import Engine, Fallback, Pair, RequestFacts
from mooncake_conductor.dialects import Body, Endpoint
from mooncake_conductor.proxy._client import ClientConnection
from mooncake_conductor.proxy._errors import ApiError
from mooncake_conductor.proxy._request import Request
from mooncake_conductor.proxy._upstream import STALE_S, Failure, Leg

if TYPE_CHECKING:
    from mooncake_conductor.proxy._frontend import Frontend

_HOP_BY_HOP = re.compile(rb"\r\n(?:connection|keep-alive|proxy-connection|te|trailer|upgrade):[^\r\n]*+", re.IGNORECASE)
_GONE = 499  # nginx's code for a client that closed its connection
# A prefill leg whose request was answered may end by itself for this long: its last byte often comes just after the
# answer's.
_LINGER_S = 5.0
_NO_BODY = Body(b"", {})


class Exchange:
    """See the module. Implements `Activity` for the client and `LegOwner` for its legs.

    ``_answer`` is the leg whose bytes the client gets (the decode leg, or the only one), ``_side`` the prefill leg,
    whose answer is only checked. Either is None once it has ended.
    """

    __slots__ = (
        "_answer",
        "_attempts",
        "_begun_at",
        "_body",
        "_client",
        "_closes_client",
        "_endpoint",
        "_facts",
        "_failed",
        "_front",
        "_is_committed",
        "_is_event_stream",
        "_moved_at",
        "_request",
        "_side",
        "_status",
    )

    def __init__(
        self,
        front: Frontend,
        client: ClientConnection,
        request: Request,
        endpoint: Endpoint,
        body: Body,
        facts: RequestFacts,
    ) -> None:
        self._front, self._client, self._request = front, client, request
        self._endpoint, self._body, self._facts = endpoint, body, facts
        self._answer: Leg | None = None
        self._side: Leg | None = None
        self._failed: list[Engine] = []
        self._attempts = self._status = 0
        self._is_committed = self._is_event_stream = self._closes_client = False
        self._begun_at = self._moved_at = request.received_at

    # --- legs out ------------------------------------------------------------------------------------------------

    def start(self, pair: Pair) -> None:
        """Send the legs, both at once."""
        self._attempts += 1
        prefill, metrics, dialect = pair.prefill, self._front.metrics, self._front.dialect
        if prefill is None:
            body = dialect.whole(self._endpoint, self._body)
            if pair.reason:
                metrics.fallbacks[pair.reason] += 1
            self._answer = self._send(pair.decode, body)
            return
        ticket = self._front.issue_ticket(prefill)
        for_prefill = dialect.prefill_leg(self._endpoint, self._body, ticket)
        for_decode = dialect.decode_leg(self._endpoint, self._body, ticket)
        metrics.pairs += 1
        self._side = self._send(prefill, for_prefill)
        self._answer = self._send(pair.decode, for_decode)

    def _send(self, engine: Engine, body: bytes) -> Leg:
        pool = self._front.pools[engine]
        head = pool.head(self._endpoint.value, self._request, len(body))
        leg = Leg(pool, self, [head, body], self._request.is_http10)
        engine.in_flight += 1
        pool.send(leg)
        return leg

    def _forget(self, leg: Leg) -> Engine:
        """The leg has ended; returns its engine."""
        if leg is self._answer:
            self._answer = None
        else:
            self._side = None
        engine = leg.pool.engine
        engine.in_flight -= 1
        return engine

    def _drop_legs(self) -> None:
        for leg in (self._answer, self._side):
            if leg is not None:
                self._forget(leg)
                leg.abort()

    # --- answers in (LegOwner) -----------------------------------------------------------------------------------

    def leg_received(self, leg: Leg, *, is_complete: bool) -> None:
        """See `LegOwner`."""
        if leg is self._side and not self._is_side_the_answer(leg):
            return
        is_news = leg.status >= 500 and leg.pool.engine not in self._failed
        if is_news and self._again(leg, Failure(f"HTTP status {leg.status}", is_connection=False)):
            return
        if is_complete or len(leg.held) > leg.head_end:
            self._commit(leg, is_complete=is_complete)

    def leg_done(self, leg: Leg) -> None:
        """See `LegOwner`."""
        is_answer = leg is self._answer
        self._forget(leg)
        if is_answer:
            self._answered()
        elif self._answer is None:
            self._end()

    def leg_failed(self, leg: Leg, failure: Failure) -> None:
        """See `LegOwner`."""
        if leg is self._side:
            self._side_failed(leg, failure)
        elif self._is_committed:
            self._front.note_failure(leg.pool.engine, failure)
            self._cut(leg, f"The engine failed while it answered: {failure.reason}.")
        elif not self._again(leg, failure):
            self._give_up(ApiError(502, f"The engine failed before it answered: {failure.reason}.", "engine_failed"))

    def _is_side_the_answer(self, leg: Leg) -> bool:
        """Look at the prefill leg's status; True if its answer goes to the client (4xx)."""
        if leg.status >= 500:
            self._side_failed(leg, Failure(f"HTTP status {leg.status}", is_connection=False))
            return False
        if leg.status < 400 or self._is_committed or self._answer is None:
            leg.held = b""
            if leg.link is not None:
                leg.link.discard()
            return False
        answer = self._answer
        self._forget(answer)
        answer.abort()
        self._answer, self._side = leg, None
        return True

    def _side_failed(self, leg: Leg, failure: Failure) -> None:
        """The prefill leg failed: another pair, or the decode engine alone."""
        front = self._front
        engine = self._forget(leg)
        leg.abort()
        front.note_failure(engine, failure)
        if self._answer is None:
            self._end()
            return
        if self._is_committed:  # the decode engine has what it needs, or helps itself
            return
        front.metrics.retries["prefill"] += 1
        self._failed.append(engine)
        facts = self._facts
        if self._attempts > front.options.retries:
            facts = facts._replace(whole=Fallback.PREFILL_FAILED)
        pair = front.decide(facts, self._failed)
        if pair is None:  # the decode leg goes on: it computes the prompt when it finds that nobody hands it over
            return
        self._drop_legs()
        self.start(pair)

    def _again(self, leg: Leg, failure: Failure) -> bool:
        """The answering leg failed before its first byte: try others. If there are none: False, and nothing changed."""
        front, engine = self._front, leg.pool.engine
        front.note_failure(engine, failure)
        self._failed.append(engine)
        pair = front.decide(self._facts, self._failed) if self._attempts <= front.options.retries else None
        if pair is None:
            return False
        front.metrics.retries["decode"] += 1
        self._drop_legs()
        self.start(pair)
        return True

    # --- to the client -------------------------------------------------------------------------------------------

    def _commit(self, leg: Leg, *, is_complete: bool) -> None:
        """Pass on the head and what came with it; from here on the answer is this leg's."""
        data, leg.held = leg.held, b""
        head = data[: leg.head_end].lower()
        self._is_committed, self._status = True, leg.status
        self._is_event_stream = b"text/event-stream" in head
        self._moved_at = now = self._front.now()
        if leg.status == 200:
            self._front.metrics.ttft.observe(now - self._begun_at)
        self._body, self._request.body = _NO_BODY, b""  # prompts are large and answers are long
        client, link = self._client, leg.link
        if client.has_to_close or leg.is_until_close or b"\r\nconnection:" in head or b"\r\nkeep-alive:" in head:
            self._closes_client = client.has_to_close or leg.is_until_close
            data = _new_head(data, leg.head_end, closes=self._closes_client)
        client.write(data)
        if link is not None:
            link.relay_to(client.write, len(data))
            if client.is_paused:
                link.pause()
        if leg.status != 200 and self._side is not None:
            side = self._side
            self._forget(side)
            side.abort()

    def _answered(self) -> None:
        """The client has its whole answer; a prefill leg may be left."""
        self._count(self._status)
        self._moved_at = self._front.now()
        if self._side is None:
            self._end()
        self._client.finished(close=self._closes_client)

    def _give_up(self, error: ApiError) -> None:
        """Answer with an error of our own; nothing was sent yet."""
        self._drop_legs()
        self._count(error.status)
        self._end()
        self._client.fail(error)

    def _cut(self, leg: Leg, why: str) -> None:
        """End an answer that cannot be completed, so that the client notices."""
        link, client = leg.link, self._client
        is_chunked = self._is_event_stream and not leg.is_until_close and not leg.is_http10
        can_tell = is_chunked and link is not None and link.is_at_boundary()
        self._drop_legs()
        self._front.metrics.cut_answers += 1
        self._count(self._status)
        self._end()
        if can_tell:
            client.write(ApiError(502, why, "engine_failed").event())
            client.finished(close=True)
        else:
            client.activity = None
            client.abort()

    def _count(self, status: int) -> None:
        self._front.metrics.requests[self._endpoint.value, status] += 1

    def _end(self) -> None:
        self._front.active.discard(self)

    # --- the client (Activity) and the clock ---------------------------------------------------------------------

    def cancel(self) -> None:
        """The client is gone: the engines' connections are closed, which makes them stop computing."""
        self._drop_legs()
        self._count(_GONE)
        self._end()

    def pause(self) -> None:
        """See `Activity`."""
        if self._is_committed and self._answer is not None and self._answer.link is not None:
            self._answer.link.pause()

    def resume(self) -> None:
        """See `Activity`."""
        if self._answer is not None and self._answer.link is not None:
            self._answer.link.resume()

    def tick(self, now: float) -> None:
        """Apply the deadlines. Called a few times a second."""
        options, answer = self._front.options, self._answer
        if answer is None:
            if now - self._moved_at > _LINGER_S:
                self._drop_legs()
                self._end()
            return
        if self._client.is_paused or (answer.link is not None and answer.link.harvest()):
            self._moved_at = now
        spent = now - self._begun_at
        if not self._is_committed:
            self._forget_what_was_sent(spent)
            limit = options.first_byte_s if self._facts.is_streamed else options.total_s
            if spent > limit:
                self._front.note_failure(answer.pool.engine, Failure(f"no answer in {limit:g} s", is_connection=False))
                self._give_up(ApiError(504, f"No engine answered within {limit:g} seconds.", "engine_timeout"))
        elif spent > options.total_s:
            self._cut(answer, f"The answer took longer than {options.total_s:g} seconds.")
        elif now - self._moved_at > options.between_bytes_s:
            self._front.note_failure(answer.pool.engine, Failure("its answer stopped", is_connection=False))
            self._cut(answer, f"The engine sent nothing for {options.between_bytes_s:g} seconds.")

    def _forget_what_was_sent(self, spent: float) -> None:
        """A connection that held so long was not stale: what was sent over it is not needed again."""
        if spent > 2 * STALE_S:
            for leg in (self._answer, self._side):
                if leg is not None and leg.link is not None:
                    leg.parts = []


def _new_head(data: bytes, head_end: int, *, closes: bool) -> bytes:
    """The answer with the connection's own headers replaced."""
    head = _HOP_BY_HOP.sub(b"", data[: head_end - 2])
    return head + (b"connection: close\r\n\r\n" if closes else b"\r\n") + data[head_end:]
