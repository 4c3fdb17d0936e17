"""An engine behind a Ray actor, as the controller sees it. The half that lives beside the controller.

Opens, resumes, closes and scores asked for in one turn of the event loop travel as one call each; one poll at a time
brings back what all streams wrote (``multiplex`` is the other half). Every wait has a time-out.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import uuid4

from ray.actor import ActorHandle
from ray.exceptions import RayError

from common.sequence import TopLogprobs
from common.waiting import WaitedTooLong, within
from common.weights import WeightUpdate
from rollout_server.engine import (
    EngineCallError,
    ScoreRequest,
    WriteRequest,
    Written,
    concatenate_written,
    write_whole,
)
from rollout_server.engines.multiplex import ReadBatch, RowsBatch, WrittenBatch

logger = logging.getLogger(__name__)

_SPACING_S = 0.005
"""At least this long between two sendings to one engine, or two polls of it; the first is not delayed. Without it every
poll of each student would send a few scores to each teacher: messages would grow with the square of the engines."""

_POLL_WAIT_S = 5.0  # an idle poll returns after this long, or half the time-out, and is sent again


@dataclass(slots=True)
class _Inbox:
    """What one stream wrote and nobody took yet."""

    pieces: list[Written] = field(default_factory=list)
    failure: str | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)


class RemoteEngine:
    """Engine protocol over an EngineActor's handle. Belongs to one event loop."""

    def __init__(self, handle: ActorHandle, *, name: str, call_timeout_s: float) -> None:
        self._handle = handle
        self._name = name
        self._timeout_s = call_timeout_s
        self._poll_wait_s = min(_POLL_WAIT_S, call_timeout_s / 2)
        self._client_id = uuid4().hex
        self._stream_numbers = count()
        self._inboxes: dict[int, _Inbox] = {}
        self._to_open: dict[int, WriteRequest] = {}
        self._to_resume: list[int] = []
        self._to_close: list[int] = []
        self._to_score: list[tuple[ScoreRequest, asyncio.Future[TopLogprobs]]] = []
        self._flushing = False
        self._next_flush_s = 0.0  # on the event loop's clock
        self._polling: asyncio.Task[None] | None = None
        self._sends: set[asyncio.Task[None]] = set()

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, None]:
        stream_id, inbox = next(self._stream_numbers), _Inbox()
        self._inboxes[stream_id] = inbox
        self._to_open[stream_id] = request
        self._flush_soon()
        try:
            finish_reason, num_taken = None, 0
            while finish_reason is None:
                await self._within(inbox.news.wait(), "the next tokens of a stream")
                inbox.news.clear()
                if inbox.failure is not None:
                    raise EngineCallError(inbox.failure)
                written, inbox.pieces = concatenate_written(inbox.pieces), []
                finish_reason = written.finish_reason
                yield written
                num_taken += len(written)
                if num_taken in request.pause_after:
                    self._to_resume.append(stream_id)
                    self._flush_soon()
        finally:
            del self._inboxes[stream_id]
            if finish_reason is None:
                self._to_close.append(stream_id)
                self._flush_soon()

    async def generate(self, request: WriteRequest) -> Written:
        return await write_whole(self, request)

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        rows: asyncio.Future[TopLogprobs] = asyncio.get_running_loop().create_future()
        self._to_score.append((request, rows))
        self._flush_soon()
        await self._within(rows, "a score")
        return rows.result()

    async def load_weights(self, update: WeightUpdate) -> None:
        await self._within(self._handle.load_weights.remote(update), "a weight update")

    async def settle(self) -> None:
        """Wait until everything sent has been taken by the engine, closes included."""
        while self._flushing or self._sends:
            await asyncio.sleep(0)
            if self._sends:
                await asyncio.wait(set(self._sends))

    def _flush_soon(self) -> None:
        """Send what has gathered when this turn of the event loop is over, or some time after the last sending."""
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_at(self._next_flush_s, self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._next_flush_s = asyncio.get_running_loop().time() + _SPACING_S
        opens, self._to_open = self._to_open, {}
        resumes, self._to_resume = self._to_resume, []
        closes, self._to_close = self._to_close, []
        scores, self._to_score = self._to_score, []
        # A stream dropped before it was sent is never opened.
        unsent = [stream_id for stream_id in closes if opens.pop(stream_id, None) is not None]
        closes = [stream_id for stream_id in closes if stream_id not in unsent]
        if opens:
            self._send(self._open(opens))
        if resumes:
            self._send(self._resume(resumes))
        if closes:
            self._send(self._close(closes))
        if scores:
            self._send(self._score(scores))

    def _send(self, call: Awaitable[None]) -> None:
        task = asyncio.ensure_future(call)
        self._sends.add(task)
        task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        """Engine failures reached who waits for them; anything else is a fault of ours and must at least be seen."""
        self._sends.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s: a sending failed", self._name, exc_info=error)

    async def _open(self, requests: dict[int, WriteRequest]) -> None:
        try:
            await self._within(self._handle.open_streams.remote(self._client_id, requests), "opening streams")
        except EngineCallError as error:
            self._fail(list(requests), str(error))
            return
        if self._polling is None or self._polling.done():
            self._polling = asyncio.ensure_future(self._poll())

    async def _resume(self, stream_ids: list[int]) -> None:
        try:
            await self._within(self._handle.resume_streams.remote(self._client_id, stream_ids), "resuming streams")
        except EngineCallError as error:
            self._fail(stream_ids, str(error))

    async def _close(self, stream_ids: list[int]) -> None:
        try:
            await self._within(self._handle.close_streams.remote(self._client_id, stream_ids), "closing streams")
        except EngineCallError as error:
            logger.warning("could not end %d dropped streams: %s", len(stream_ids), error)

    async def _score(self, asked: list[tuple[ScoreRequest, asyncio.Future[TopLogprobs]]]) -> None:
        try:
            call = self._handle.score.remote(ReadBatch.pack([request for request, _ in asked]))
            batch: RowsBatch = await self._within(call, f"{len(asked)} scores")
            results = [f"{self._name}: {rows}" if isinstance(rows, str) else rows for rows in batch.unpack()]
        except EngineCallError as error:
            results = [str(error)] * len(asked)
        for (_, rows), result in zip(asked, results, strict=True):
            if rows.done():
                continue  # the caller no longer waits
            if isinstance(result, str):
                rows.set_exception(EngineCallError(result))
            else:
                rows.set_result(result)

    async def _poll(self) -> None:
        """Consumes the actor's batches; produces into the inboxes; stops when no stream is open."""
        clock = asyncio.get_running_loop().time
        next_poll_s = clock()
        while self._inboxes:
            await asyncio.sleep(max(0.0, next_poll_s - clock()))
            next_poll_s = clock() + _SPACING_S
            try:
                batch: WrittenBatch = await self._within(
                    self._handle.poll.remote(self._client_id, self._poll_wait_s), "a poll"
                )
            except EngineCallError as error:
                self._fail(list(self._inboxes), str(error))
                return
            for stream_id, written in batch.unpack():
                if (inbox := self._inboxes.get(stream_id)) is not None:
                    inbox.pieces.append(written)
                    inbox.news.set()
            for stream_id, failure in batch.failures.items():
                self._fail([stream_id], f"{self._name}: {failure}")

    def _fail(self, stream_ids: list[int], failure: str) -> None:
        for stream_id in stream_ids:
            if (inbox := self._inboxes.get(stream_id)) is not None:
                inbox.failure = failure
                inbox.news.set()

    async def _within(self, call: Awaitable[Any], what: str) -> Any:
        """The call's result. EngineCallError when it fails, or takes longer than the time-out."""
        try:
            return await within(self._timeout_s, call, what)
        except WaitedTooLong as error:
            raise EngineCallError(f"{self._name}: {error}") from error
        except RayError as error:
            raise EngineCallError(f"{self._name}: {what} failed: {error}") from error
