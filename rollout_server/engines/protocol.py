"""What the controller asks of an engine, defined by its consumer. Knows nothing of vLLM or Ray.

n = tokens in a piece of text, k = length of a top list. Positions count from 0 at the first token of ``prefix``: the
row of position j is the distribution of token j given tokens 0..j-1.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from common.config import EngineSettings
from common.sequence import FinishReason, Floats, Ids, TopLogprobs
from common.weights import SyncBackend, WeightUpdate, WeightVersion

MAX_EXCLUDED = 1024
"""Tokens that a request can exclude: as many as vLLM's Model Runner V2 has room for. More of them end its engine."""
_SIGN_OF_LIFE = 256
"""Tokens after which a text that is wanted whole shows that it grows."""


class EngineCallError(RuntimeError):
    """A call to an engine failed or took too long. Says which engine and what was waited for."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WriteRequest:
    """Go on from a prefix. Same request, same engine, same weights: same tokens."""

    prefix: Ids  # [n] prompt and all tokens so far
    max_tokens: int
    temperature: float  # 0 is greedy
    top_p: float
    seed: int
    chunk_tokens: int  # hand over about this many tokens at a time; where exactly to cut is the engine's
    stop_token_ids: tuple[int, ...] = ()  # end after one of these, besides the model's own end-of-sequence token
    excluded_token_ids: tuple[int, ...] = ()  # never write these; at most MAX_EXCLUDED
    sequence_id: str | None = None  # whose text this is; calls of one sequence find their prefix in one replica
    # After so many tokens hand over what is there, and write no more until the reader says how far. Changes no token.
    pause_after: int | None = None
    ignore_eos: bool = False  # no token ends the text, not even the model's own end-of-sequence token

    def __post_init__(self) -> None:
        assert self.max_tokens >= 1, self.max_tokens
        assert self.chunk_tokens >= 1, self.chunk_tokens
        assert len(self.excluded_token_ids) <= MAX_EXCLUDED, len(self.excluded_token_ids)
        assert self.pause_after is None or self.pause_after >= 1, self.pause_after
        assert not (self.ignore_eos and self.stop_token_ids), "a text that no token ends has no stop tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class GoOn:
    """What the reader of a stream that pauses says to it."""

    num_tokens: int | None = None  # to write until the next pause; None for all
    token_id: int | None = None  # to go on after in place of the last one written

    def pause_after(self, num_written: int) -> int | None:
        """The next pause, in tokens since the stream began, of which there are ``num_written``."""
        return None if self.num_tokens is None else num_written + self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Written:
    """Tokens one engine wrote in a row, each with what its model knew when it wrote it."""

    token_ids: Ids  # [n]
    logprobs: Floats  # [n] nats, of the written token
    top: TopLogprobs  # [n, k]
    weight_version: WeightVersion
    finish_reason: FinishReason | None  # None while the engine goes on

    def __post_init__(self) -> None:
        assert self.token_ids.size == self.logprobs.size == len(self.top), (self.token_ids.size, len(self.top))

    def __len__(self) -> int:
        return int(self.token_ids.size)

    def __getitem__(self, rows: slice) -> "Written":
        return replace(self, token_ids=self.token_ids[rows], logprobs=self.logprobs[rows], top=self.top[rows])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreRequest:
    """Read a text. Rows are wanted for positions ``start`` to ``len(token_ids)``, the last being the token to come."""

    token_ids: Ids  # [n]
    start: int
    sequence_id: str | None = None  # as in WriteRequest

    def __post_init__(self) -> None:
        assert 1 <= self.start <= self.token_ids.size, f"start must be in 1..{self.token_ids.size}, got {self.start}"

    @property
    def num_rows(self) -> int:
        return int(self.token_ids.size) - self.start + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """One engine to be started."""

    name: str  # for messages and metrics: "student", "teacher"
    run: str = ""  # whose engine this is, for metrics
    model: str  # folder or hub name
    settings: EngineSettings
    top_logprobs: int
    trust_remote_code: bool = False
    weight_transfer_backend: SyncBackend | None = None  # None for an engine whose weights never change


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a started engine turned out to be."""

    dtype: str  # what it computes in, e.g. "float32"
    max_model_len: int  # tokens, prompt and answer together
    top_logprobs: int  # k: what was asked for, at most the vocabulary


class Engine(Protocol):
    """A language model that writes and reads. Every method may be called many hundred times at once."""

    def stream(self, request: WriteRequest) -> AsyncGenerator[Written, GoOn | None]:
        """Yield what has been written since the last yield, until it has a finish_reason.

        The engine writes on meanwhile, but at a pause: there it waits for an ``asend`` that says how to go on, or for
        the next ``anext``, which has it write all the rest. Closing the generator ends the request in the engine.
        """
        ...

    async def generate(self, request: WriteRequest) -> Written:
        """Write to the end and return it whole. Cancelling ends the request in the engine."""
        ...

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        """The rows asked for, [request.num_rows, k]; valid whatever the engine's cache held."""
        ...

    async def load_weights(self, update: WeightUpdate) -> None:
        """Pause, take the new weights, drop every cached state of the old ones, go on under the new version.

        One call, so that a learner that dies half-way can't leave an engine paused.
        """
        ...


async def next_piece(pieces: AsyncGenerator[Written, GoOn | None], go_on: GoOn | None = None) -> Written | None:
    """A stream's next piece, after sending it ``go_on``; None when it has ended."""
    try:
        return await pieces.asend(go_on)
    except StopAsyncIteration:
        return None


async def write_whole(engine: Engine, request: WriteRequest) -> Written:
    """``generate`` by way of ``stream``, for engines that have no shorter way.

    In pieces so large that they cost little, and so small that a long text shows that it grows.
    """
    chunk_tokens = min(request.max_tokens, _SIGN_OF_LIFE)
    parts = [written async for written in engine.stream(replace(request, chunk_tokens=chunk_tokens))]
    assert parts, "a stream must yield at least once"
    assert parts[-1].finish_reason is not None, "a stream must end with a finish_reason"
    return concatenate_written(parts)


def concatenate_written(parts: list[Written]) -> Written:
    """One piece from consecutive ones. The version is that of the last."""
    if len(parts) == 1:
        return parts[0]
    return Written(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        top=TopLogprobs.concatenate([part.top for part in parts]),
        weight_version=parts[-1].weight_version,
        finish_reason=parts[-1].finish_reason,
    )
