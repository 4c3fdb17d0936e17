"""Messages between a controller and an engine's process, in columns. One message carries the requests or results of
many calls, so under load messages get larger, not more frequent. Independent of ``client`` and ``server``.

m = calls, n = total tokens or rows of the calls, k = length of a top-k list. The client chooses the id of a call.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.sequence import FinishReason, Floats, Ids, TopLogprobs
from rollout_server.engines.protocol import GoOn, ScoreRequest, WriteRequest, Written

CallIds = npt.NDArray[np.int64]

_FINISH_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WrittenBatch:
    """Output of m streams."""

    call_ids: CallIds  # [m]
    num_tokens: Ids  # [m]
    finish_codes: npt.NDArray[np.uint8]  # [m] index in _FINISH_REASONS
    weight_versions: Ids  # [m]
    token_ids: Ids  # [n]
    logprobs: Floats  # [n] nats
    top: TopLogprobs  # [n, k]

    @classmethod
    def pack(cls, moved: Sequence[tuple[int, Written]]) -> "WrittenBatch":
        pieces = [written for _, written in moved]
        return cls(
            call_ids=np.array([call_id for call_id, _ in moved], np.int64),
            num_tokens=np.array([len(piece) for piece in pieces], np.int32),
            finish_codes=np.array([_FINISH_REASONS.index(piece.finish_reason) for piece in pieces], np.uint8),
            weight_versions=np.array([piece.weight_version for piece in pieces], np.int32),
            token_ids=np.concatenate([np.empty(0, np.int32), *(piece.token_ids for piece in pieces)]),
            logprobs=np.concatenate([np.empty(0, np.float32), *(piece.logprobs for piece in pieces)]),
            top=TopLogprobs.concatenate([piece.top for piece in pieces]) if pieces else TopLogprobs.empty(1),
        )

    def unpack(self) -> Iterator[tuple[int, Written]]:
        """Each stream's output, as views of the columns."""
        end = 0
        columns = (self.call_ids, self.num_tokens, self.weight_versions, self.finish_codes)
        for call_id, num_tokens, version, code in zip(*(column.tolist() for column in columns), strict=True):
            start, end = end, end + num_tokens
            yield (
                call_id,
                Written(
                    token_ids=self.token_ids[start:end],
                    logprobs=self.logprobs[start:end],
                    top=self.top[start:end],
                    weight_version=version,
                    finish_reason=_FINISH_REASONS[code],
                ),
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreBatch:
    """m score requests. Sequence ids are not sent, because the engine does not need them."""

    call_ids: CallIds  # [m]
    num_tokens: Ids  # [m]
    starts: Ids  # [m]
    token_ids: Ids  # [n]

    @classmethod
    def pack(cls, asked: Sequence[tuple[int, ScoreRequest]]) -> "ScoreBatch":
        requests = [request for _, request in asked]
        return cls(
            call_ids=np.array([call_id for call_id, _ in asked], np.int64),
            num_tokens=np.array([request.token_ids.size for request in requests], np.int32),
            starts=np.array([request.start for request in requests], np.int32),
            token_ids=np.concatenate([np.empty(0, np.int32), *(request.token_ids for request in requests)]),
        )

    def unpack(self) -> Iterator[tuple[int, ScoreRequest]]:
        ends = self.num_tokens.cumsum()
        for call_id, start, first, end in zip(
            self.call_ids.tolist(), self.starts.tolist(), (ends - self.num_tokens).tolist(), ends.tolist(), strict=True
        ):
            yield call_id, ScoreRequest(token_ids=self.token_ids[first:end], start=start)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowsBatch:
    """The rows of m score requests."""

    call_ids: CallIds  # [m]
    num_rows: Ids  # [m]
    top: TopLogprobs  # [n, k]

    @classmethod
    def pack(cls, read: Sequence[tuple[int, TopLogprobs]]) -> "RowsBatch":
        rows = [top for _, top in read]
        return cls(
            call_ids=np.array([call_id for call_id, _ in read], np.int64),
            num_rows=np.array([len(top) for top in rows], np.int32),
            top=TopLogprobs.concatenate(rows) if rows else TopLogprobs.empty(1),
        )

    def unpack(self) -> Iterator[tuple[int, TopLogprobs]]:
        """Each request's rows, as views of the columns."""
        ends = self.num_rows.cumsum()
        for call_id, first, end in zip(
            self.call_ids.tolist(), (ends - self.num_rows).tolist(), ends.tolist(), strict=True
        ):
            yield call_id, self.top[first:end]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClientMessage:
    """New requests of a client."""

    number: int  # of the client's messages, from 0
    opens: dict[int, WriteRequest]
    resumes: dict[int, GoOn]  # paused streams -> how they continue
    closes: list[int]  # streams and scores that are no longer needed
    scores: ScoreBatch
    previous_client: str | None = None  # this client's id before a message was lost: end the calls of that id


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServerMessage:
    """Results of a client's calls since the last reply."""

    written: WrittenBatch
    rows: RowsBatch
    failures: dict[int, str]  # call id -> error; the call has ended

    @classmethod
    def empty(cls) -> "ServerMessage":
        return cls(written=WrittenBatch.pack([]), rows=RowsBatch.pack([]), failures={})
