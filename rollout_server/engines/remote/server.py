"""Runs all calls of an engine's clients. It runs in the engine's process; ``client`` is the counterpart. Does not know
about Ray.
"""

import asyncio
import logging
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from common.sequence import TopLogprobs
from common.waiting import within
from rollout_server.engines.protocol import Engine, GoOn, ScoreRequest, WriteRequest, Written, next_piece
from rollout_server.engines.remote.messages import ClientMessage, RowsBatch, ServerMessage, WrittenBatch

logger = logging.getLogger(__name__)

_CLIENT_TIMEOUT_S = 120.0
"""A waiting client sends a message every few seconds. After this time without one it is considered dead."""


@dataclass(slots=True)
class _Client:
    """One client of this engine: its running calls, and their results since the last reply."""

    calls: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    paused: dict[int, asyncio.Future[GoOn]] = field(default_factory=dict)  # set when the client resumes the stream
    written: list[tuple[int, Written]] = field(default_factory=list)
    rows: list[tuple[int, TopLogprobs]] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    waiting: asyncio.Event | None = None  # of the latest exchange, while it waits for results
    num_exchanges: int = 0
    early: dict[int, asyncio.Event] = field(default_factory=dict)  # messages that arrived early; set at their turn
    last_message_s: float = 0.0  # event loop time of the last message

    def notify(self) -> None:
        """Wake up the waiting exchange: there are results, or a newer exchange replaces it."""
        if self.waiting is not None:
            self.waiting.set()

    def take_results(self) -> ServerMessage:
        written, self.written = self.written, []
        rows, self.rows = self.rows, []
        failures, self.failures = self.failures, {}
        return ServerMessage(written=WrittenBatch.pack(written), rows=RowsBatch.pack(rows), failures=failures)

    def close(self, call_id: int) -> None:
        self.paused.pop(call_id, None)
        if (task := self.calls.pop(call_id, None)) is not None:
            task.cancel()

    def close_all(self) -> list[int]:
        """End all calls and return their ids."""
        call_ids = list(self.calls)
        for call_id in call_ids:
            self.close(call_id)
        return call_ids


class StreamMultiplexer:
    """Runs the calls of all clients of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.num_written_tokens = 0
        self.num_read_positions = 0
        self._clients: dict[str, _Client] = {}
        self._progress_s = time.monotonic()

    @property
    def num_busy(self) -> int:
        """Running calls, not counting paused streams."""
        return sum(len(client.calls) - len(client.paused) for client in self._clients.values())

    @property
    def still_s(self) -> float:
        """Seconds since the last output of any call, or since the first call started; 0 if no call is running."""
        return time.monotonic() - self._progress_s if self.num_busy else 0.0

    def drop_calls(self) -> None:
        """End every call. Live clients are told that their calls failed."""
        for client in self._clients.values():
            dropped = client.close_all()
            client.failures |= dict.fromkeys(dropped, "dropped: another worker of the run is being restarted")
            client.notify()

    async def exchange(self, client_id: str, message: ClientMessage, wait_s: float) -> ServerMessage:
        """Accept requests. Return all results since the client's last exchange, or wait up to ``wait_s`` for the first.

        An exchange ends the wait of the client's previous one, which then returns an empty reply. So requests need not
        wait for results, and results stay in order. Exchanges are processed in the order of their numbers, even if Ray
        delivers them in another order.
        """
        client = self._clients.setdefault(client_id, _Client())
        client.last_message_s = asyncio.get_running_loop().time()
        if message.number != client.num_exchanges:
            turn = client.early[message.number] = asyncio.Event()
            await within(_CLIENT_TIMEOUT_S, turn.wait(), f"exchange {client.num_exchanges} of a client")
        client.num_exchanges += 1
        self._accept(client, message)
        client.notify()
        waiting = client.waiting = asyncio.Event()
        if (turn_of_next := client.early.pop(client.num_exchanges, None)) is not None:
            turn_of_next.set()
        self._drop_inactive_clients(client.last_message_s)
        if not (client.written or client.rows or client.failures):
            with suppress(TimeoutError):
                await asyncio.wait_for(waiting.wait(), wait_s)
        if client.waiting is not waiting:
            return ServerMessage.empty()
        client.waiting = None
        return client.take_results()

    def _accept(self, client: _Client, message: ClientMessage) -> None:
        if message.previous_client is not None:
            self._drop_client(message.previous_client)
        if not self.num_busy:
            self._progress_s = time.monotonic()
        for call_id, request in message.opens.items():
            client.calls[call_id] = asyncio.create_task(self._write(client, call_id, request))
        for call_id, read in message.scores.unpack():
            client.calls[call_id] = asyncio.create_task(self._read(client, call_id, read))
        for call_id, go_on in message.resumes.items():
            if (paused := client.paused.pop(call_id, None)) is not None:
                paused.set_result(go_on)
        for call_id in message.closes:
            client.close(call_id)
        if message.closes:
            dropped = set(message.closes)
            client.written = [piece for piece in client.written if piece[0] not in dropped]

    def _drop_inactive_clients(self, now_s: float) -> None:
        """Drop the calls of clients that died without closing them."""
        for client_id, client in list(self._clients.items()):
            if client.calls and now_s - client.last_message_s > _CLIENT_TIMEOUT_S:
                logger.warning(
                    "no message from a client for %.0f s: ending its %d calls", _CLIENT_TIMEOUT_S, len(client.calls)
                )
                self._drop_client(client_id)

    def _drop_client(self, client_id: str) -> None:
        """End a client's running calls, if the client is known."""
        if (client := self._clients.pop(client_id, None)) is not None:
            client.close_all()
            client.notify()

    async def _write(self, client: _Client, call_id: int, request: WriteRequest) -> None:
        """Consumes one stream of the engine; produces into the client's results; waits for the client at pauses; stops
        when the stream ends or is closed.
        """
        num_written, pause_after, go_on = 0, request.pause_after, None
        try:
            async with aclosing(self._engine.stream(request)) as pieces:
                while (piece := await next_piece(pieces, go_on)) is not None:
                    num_written, go_on = num_written + len(piece), None
                    paused: asyncio.Future[GoOn] | None = None
                    if piece.finish_reason is None and num_written == pause_after:
                        paused = client.paused[call_id] = asyncio.get_running_loop().create_future()
                    client.written.append((call_id, piece))
                    self.num_written_tokens += len(piece)
                    self._progress_s = time.monotonic()
                    client.notify()
                    if paused is not None:
                        go_on = await paused
                        pause_after = go_on.pause_after(num_written)
        except Exception as error:
            self._fail(client, call_id, error)
        finally:
            client.paused.pop(call_id, None)
            client.calls.pop(call_id, None)

    async def _read(self, client: _Client, call_id: int, request: ScoreRequest) -> None:
        try:
            rows = await self._engine.score(request)
            client.rows.append((call_id, rows))
            self.num_read_positions += request.num_rows
            self._progress_s = time.monotonic()
            client.notify()
        except Exception as error:
            self._fail(client, call_id, error)
        finally:
            client.calls.pop(call_id, None)

    def _fail(self, client: _Client, call_id: int, error: Exception) -> None:
        logger.error("call %d failed", call_id, exc_info=error)
        client.failures[call_id] = f"{type(error).__name__}: {error}"
        client.notify()
