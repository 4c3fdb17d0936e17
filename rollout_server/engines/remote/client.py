"""Client for an engine in a Ray actor. It runs in the controller's process and implements the Engine protocol.

All requests made since the last message are sent together, and the reply contains the results of all calls. ``server``
is the counterpart, ``messages`` defines the messages. Every wait has a time-out.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import uuid4

from ray.actor import ActorHandle
from ray.exceptions import RayError

from common.sequence import TopLogprobs
from common.waiting import WaitedTooLong, within
from common.weights import WeightUpdate
from rollout_server.engines.protocol import (
    EngineCallError,
    GoOn,
    ScoreRequest,
    WriteRequest,
    Written,
    concatenate_written,
    write_whole,
)
from rollout_server.engines.remote.messages import ClientMessage, ScoreBatch, ServerMessage

logger = logging.getLogger(__name__)

_SPACING_S = 0.02
"""Minimum time between two messages to one engine; the first is sent at once. Without it every message of each student
would send a few scores to each teacher, and the number of messages would grow with the square of the engines. Requests
that arrive together are also batched in one engine step. On two cores adaswitch and skd were 5 % slower with 5 ms."""

_SPACING_PER_CALL_S, _LONGEST_SPACING_S = 0.0004, 0.1
"""A message takes one to two milliseconds of the controller's core, whatever its size, and an engine step takes longer
with more requests. docs/decisions/2026-11-25-controller-time has the measured gain."""

_READY_SHARE = 1 / 8
"""If this share of the running calls waits for the next message, it is sent without further delay."""

_WAIT_S = 5.0  # the server replies after this time (or half the time-out) even if there is nothing new


@dataclass(slots=True)
class _Inbox:
    """Output of one stream that has not been consumed yet."""

    pieces: list[Written] = field(default_factory=list)
    failure: str | None = None
    updated: asyncio.Event = field(default_factory=asyncio.Event)


class RemoteEngine:
    """Engine protocol over an EngineActor's handle. Belongs to one event loop."""

    def __init__(self, handle: ActorHandle, *, name: str, call_timeout_s: float) -> None:
        self._handle = handle
        self._name = name
        self._timeout_s = call_timeout_s
        self._wait_s = min(_WAIT_S, call_timeout_s / 2)
        self._client_id = uuid4().hex
        self._previous_client: str | None = None  # this client's previous id, sent in every message
        self._call_numbers = count()
        self._message_numbers = count()
        self._inboxes: dict[int, _Inbox] = {}
        self._scores: dict[int, asyncio.Future[TopLogprobs]] = {}
        self._to_open: dict[int, WriteRequest] = {}
        self._to_resume: dict[int, GoOn] = {}
        self._to_score: dict[int, ScoreRequest] = {}
        self._to_close: list[int] = []
        self._sending: asyncio.Handle | None = None  # timer of the next message
        self._sent_s = self._due_s = 0.0  # event loop time of the last message and of the next
        self._progress_s = 0.0  # event loop time of the last output of any call
        self._exchanges: set[asyncio.Task[None]] = set()

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, GoOn | None]:
        call_id, inbox = next(self._call_numbers), _Inbox()
        self._inboxes[call_id] = inbox
        self._to_open[call_id] = request
        self._send_soon()
        try:
            finish_reason, num_taken, pause_after = None, 0, request.pause_after
            while finish_reason is None:
                await self._wait_for_progress(inbox.updated.wait, "the next tokens of a stream")
                inbox.updated.clear()
                if inbox.failure is not None:
                    raise EngineCallError(inbox.failure)
                written, inbox.pieces = concatenate_written(inbox.pieces), []
                finish_reason, num_taken = written.finish_reason, num_taken + len(written)
                go_on = (yield written) or GoOn()
                if num_taken == pause_after:
                    pause_after = go_on.pause_after(num_taken)
                    self._to_resume[call_id] = go_on
                    self._send_soon()
        finally:
            del self._inboxes[call_id]
            if finish_reason is None:
                self._close(call_id)

    async def generate(self, request: WriteRequest) -> Written:
        return await write_whole(self, request)

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        call_id = next(self._call_numbers)
        rows: asyncio.Future[TopLogprobs] = asyncio.get_running_loop().create_future()
        self._scores[call_id] = rows
        self._to_score[call_id] = request
        self._send_soon()
        try:
            await self._wait_for_progress(lambda: asyncio.wait([rows]), "a score")
            return rows.result()
        finally:
            del self._scores[call_id]
            if not rows.done() or rows.cancelled():
                self._close(call_id)

    async def load_weights(self, update: WeightUpdate) -> None:
        await self._within(self._handle.load_weights.remote(update), "a weight update")

    def _close(self, call_id: int) -> None:
        """End a call. A call that has not been sent yet is never sent."""
        if self._to_open.pop(call_id, None) is None and self._to_score.pop(call_id, None) is None:
            self._to_resume.pop(call_id, None)
            self._to_close.append(call_id)
            self._send_soon()

    def _send_soon(self) -> None:
        """Send all pending requests after this turn of the event loop, or later to keep the message spacing."""
        num_gathered = len(self._to_open) + len(self._to_resume) + len(self._to_score) + len(self._to_close)
        spacing_s = message_spacing_s(num_calls=len(self._inboxes) + len(self._scores), num_gathered=num_gathered)
        due_s = self._sent_s + spacing_s
        if self._sending is not None:
            if self._due_s <= due_s:
                return
            self._sending.cancel()
        self._due_s = due_s
        self._sending = asyncio.get_running_loop().call_at(due_s, self._send)

    def _send(self) -> None:
        self._sending = None
        self._sent_s = asyncio.get_running_loop().time()
        message = ClientMessage(
            number=next(self._message_numbers),
            opens=self._to_open,
            resumes=self._to_resume,
            closes=self._to_close,
            scores=ScoreBatch.pack(list(self._to_score.items())),
            previous_client=self._previous_client,
        )
        sent = [*self._to_open, *self._to_resume, *self._to_score]
        self._to_open, self._to_resume, self._to_score, self._to_close = {}, {}, {}, []
        exchange = asyncio.ensure_future(self._exchange(message, sent, after=frozenset(self._exchanges)))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._exchanged)

    async def _exchange(self, message: ClientMessage, sent: list[int], *, after: frozenset[asyncio.Task[None]]) -> None:
        """Send a message and deliver the reply, but not before the replies of the exchanges in ``after``."""
        wait_s = self._wait_s if self._inboxes or self._scores else 0.0
        client_id = self._client_id
        try:
            call = self._handle.exchange.remote(client_id, message, wait_s)
            reply: ServerMessage = await self._within(call, "an answer")
        except EngineCallError as error:
            # Requests and replies since then may be lost too: the engine is down or does not answer.
            self._fail({*sent, *self._inboxes, *self._scores}, str(error))
            if client_id == self._client_id:
                self._reset_client()
            return
        if after:
            await asyncio.wait(after)
        if reply.written.call_ids.size or reply.rows.call_ids.size:
            self._progress_s = asyncio.get_running_loop().time()
        for call_id, written in reply.written.unpack():
            if (inbox := self._inboxes.get(call_id)) is not None:
                inbox.pieces.append(written)
                inbox.updated.set()
        for call_id, top in reply.rows.unpack():
            if (rows := self._scores.get(call_id)) is not None and not rows.done():
                rows.set_result(top)
        for call_id, failure in reply.failures.items():
            self._fail({call_id}, f"{self._name}: {failure}")

    def _reset_client(self) -> None:
        """Continue under a new client id with message numbers from 0: a live server would wait for the lost message."""
        self._previous_client, self._client_id = self._client_id, uuid4().hex
        self._message_numbers = count()
        self._exchanges.clear()

    def _exchanged(self, exchange: asyncio.Task[None]) -> None:
        """Send the next message while calls are waiting. Unexpected errors are logged."""
        self._exchanges.discard(exchange)
        if exchange.cancelled():
            return
        if (error := exchange.exception()) is not None:
            logger.error("%s: an exchange failed", self._name, exc_info=error)
        if not self._exchanges and (self._inboxes or self._scores):
            self._send_soon()

    def _fail(self, call_ids: set[int], failure: str) -> None:
        for call_id in call_ids:
            if (inbox := self._inboxes.get(call_id)) is not None:
                inbox.failure = failure
                inbox.updated.set()
            if (rows := self._scores.get(call_id)) is not None and not rows.done():
                rows.set_exception(EngineCallError(failure))

    async def _wait_for_progress(self, wait: Callable[[], Coroutine[Any, Any, object]], what: str) -> None:
        """Wait for output of one call. EngineCallError if no call has had any output for the time-out.

        If there are more requests than the engine can run at once, a call waits for others, however long they take.
        """
        loop = asyncio.get_running_loop()
        waits_since_s = loop.time()
        while True:
            still_s = loop.time() - max(waits_since_s, self._progress_s)
            try:
                await within(self._timeout_s - still_s, wait(), what)
                return
            except WaitedTooLong as error:
                if loop.time() - max(waits_since_s, self._progress_s) >= self._timeout_s:
                    raise EngineCallError(f"{self._name}: waited {self._timeout_s:g} s for {what}") from error

    async def _within(self, call: Awaitable[Any], what: str) -> Any:
        """The call's result. EngineCallError if it fails or exceeds the time-out."""
        try:
            return await within(self._timeout_s, call, what)
        except WaitedTooLong as error:
            raise EngineCallError(f"{self._name}: {error}") from error
        except RayError as error:
            raise EngineCallError(f"{self._name}: {what} failed: {error}") from error


def message_spacing_s(*, num_calls: int, num_gathered: int) -> float:
    """Seconds between two messages to an engine with ``num_calls`` running calls and ``num_gathered`` pending ones."""
    if num_gathered >= _READY_SHARE * num_calls:
        return _SPACING_S
    return min(max(_SPACING_S, num_calls * _SPACING_PER_CALL_S), _LONGEST_SPACING_S)
