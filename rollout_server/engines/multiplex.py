"""Many streams of one engine as one flow of columns. The half that lives beside the engine; ``remote`` is the other.

One message carries what every stream of a client has written since the client's last poll, so messages grow with the
load instead of multiplying with it. Knows nothing of Ray.

m = streams that moved, n = their tokens together, k = length of a top list.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from common.sequence import FinishReason, Floats, Ids, TopLogprobs
from rollout_server.engine import Engine, ScoreRequest, WriteRequest, Written

logger = logging.getLogger(__name__)

_FINISH_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WrittenBatch:
    """What m streams wrote, in columns, and the streams that failed."""

    stream_ids: npt.NDArray[np.int64]  # [m]
    num_tokens: Ids  # [m]
    finish_codes: npt.NDArray[np.uint8]  # [m] index in _FINISH_REASONS
    weight_versions: Ids  # [m]
    token_ids: Ids  # [n]
    logprobs: Floats  # [n] nats
    top: TopLogprobs  # [n, k]
    failures: dict[int, str]  # stream id -> error

    @classmethod
    def pack(cls, moved: Sequence[tuple[int, Written]], failures: dict[int, str]) -> "WrittenBatch":
        pieces = [written for _, written in moved]
        return cls(
            stream_ids=np.array([stream_id for stream_id, _ in moved], np.int64),
            num_tokens=np.array([len(piece) for piece in pieces], np.int32),
            finish_codes=np.array([_FINISH_REASONS.index(piece.finish_reason) for piece in pieces], np.uint8),
            weight_versions=np.array([piece.weight_version for piece in pieces], np.int32),
            token_ids=np.concatenate([np.empty(0, np.int32), *(piece.token_ids for piece in pieces)]),
            logprobs=np.concatenate([np.empty(0, np.float32), *(piece.logprobs for piece in pieces)]),
            top=TopLogprobs.concatenate([piece.top for piece in pieces]) if pieces else TopLogprobs.empty(1),
            failures=failures,
        )

    def unpack(self) -> Iterator[tuple[int, Written]]:
        """Each stream's piece, as views of the columns."""
        end = 0
        columns = (self.stream_ids, self.num_tokens, self.weight_versions, self.finish_codes)
        for stream_id, num_tokens, version, code in zip(*(column.tolist() for column in columns), strict=True):
            start, end = end, end + num_tokens
            yield (
                stream_id,
                Written(
                    token_ids=self.token_ids[start:end],
                    logprobs=self.logprobs[start:end],
                    top=self.top[start:end],
                    weight_version=version,
                    finish_reason=_FINISH_REASONS[code],
                ),
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadBatch:
    """m score requests in columns. Whose text it is stays behind: the engine does not need it."""

    num_tokens: Ids  # [m]
    starts: Ids  # [m]
    token_ids: Ids  # [n]

    @classmethod
    def pack(cls, requests: Sequence[ScoreRequest]) -> "ReadBatch":
        return cls(
            num_tokens=np.array([request.token_ids.size for request in requests], np.int32),
            starts=np.array([request.start for request in requests], np.int32),
            token_ids=np.concatenate([request.token_ids for request in requests]),
        )

    def unpack(self) -> list[ScoreRequest]:
        texts = np.split(self.token_ids, self.num_tokens.cumsum()[:-1])
        return [
            ScoreRequest(token_ids=text, start=start) for text, start in zip(texts, self.starts.tolist(), strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowsBatch:
    """The rows of m score requests in columns, none for those that failed."""

    num_rows: Ids  # [m]
    top: TopLogprobs  # [n, k]
    failures: dict[int, str]  # place of the request -> error

    @classmethod
    def pack(cls, results: Sequence[TopLogprobs | BaseException]) -> "RowsBatch":
        rows = [result for result in results if isinstance(result, TopLogprobs)]
        return cls(
            num_rows=np.array(
                [0 if isinstance(result, BaseException) else len(result) for result in results], np.int32
            ),
            top=TopLogprobs.concatenate(rows) if rows else TopLogprobs.empty(1),
            failures={
                place: _describe(result) for place, result in enumerate(results) if isinstance(result, BaseException)
            },
        )

    def unpack(self) -> list[TopLogprobs | str]:
        """Each request's rows, as views of the columns, or the error it ended with."""
        ends = self.num_rows.cumsum().tolist()
        return [
            self.failures[place] if place in self.failures else self.top[end - num_rows : end]
            for place, (end, num_rows) in enumerate(zip(ends, self.num_rows.tolist(), strict=True))
        ]


@dataclass(slots=True)
class _Client:
    """One reader of this engine: its running streams and what they wrote since it last asked."""

    streams: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    paused: dict[int, asyncio.Event] = field(default_factory=dict)  # set when the reader comes back
    moved: list[tuple[int, Written]] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)


class StreamMultiplexer:
    """Runs the streams of all clients of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._clients: dict[str, _Client] = {}

    def open(self, client_id: str, requests: dict[int, WriteRequest]) -> None:
        """Start streams under ids the client chose."""
        client = self._clients.setdefault(client_id, _Client())
        for stream_id, request in requests.items():
            client.streams[stream_id] = asyncio.create_task(self._run(client, stream_id, request))

    def resume(self, client_id: str, stream_ids: Sequence[int]) -> None:
        """The client has taken all that these streams wrote up to a pause, and wants more."""
        client = self._clients[client_id]
        for stream_id in stream_ids:
            if stream_id in client.paused:
                client.paused.pop(stream_id).set()

    async def poll(self, client_id: str, wait_s: float) -> WrittenBatch:
        """All that the client's streams wrote since its last poll; an empty batch when nothing comes in ``wait_s``."""
        client = self._clients.setdefault(client_id, _Client())
        with suppress(TimeoutError):
            await asyncio.wait_for(client.news.wait(), wait_s)
        client.news.clear()
        moved, client.moved = client.moved, []
        failures, client.failures = client.failures, {}
        return WrittenBatch.pack(moved, failures)

    async def close(self, client_id: str, stream_ids: Sequence[int]) -> None:
        """End streams the client has dropped, in the engine too. Returns when they have ended."""
        client = self._clients[client_id]
        tasks = [client.streams.pop(stream_id) for stream_id in stream_ids if stream_id in client.streams]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        dropped = set(stream_ids)
        client.moved = [piece for piece in client.moved if piece[0] not in dropped]

    async def score(self, requests: ReadBatch) -> RowsBatch:
        """Each request's rows, or the error it ended with."""
        results = await asyncio.gather(*map(self._engine.score, requests.unpack()), return_exceptions=True)
        return RowsBatch.pack(results)

    async def _run(self, client: _Client, stream_id: int, request: WriteRequest) -> None:
        """Consumes one stream of the engine; produces into the client's outbox; waits for the client at pauses; stops
        when the stream ends or is closed.
        """
        num_written = 0
        try:
            async with aclosing(self._engine.stream(request)) as pieces:
                async for piece in pieces:
                    num_written += len(piece)
                    pause = asyncio.Event()
                    if num_written in request.pause_after:
                        client.paused[stream_id] = pause
                    client.moved.append((stream_id, piece))
                    client.news.set()
                    if stream_id in client.paused:
                        await pause.wait()
        except Exception as error:
            logger.exception("stream %d failed", stream_id)
            client.failures[stream_id] = _describe(error)
            client.news.set()
        finally:
            client.paused.pop(stream_id, None)
            client.streams.pop(stream_id, None)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
