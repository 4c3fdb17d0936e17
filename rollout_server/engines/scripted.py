"""An engine without a model: a script gives the next-token distribution after a text. For tests and for planning.

It behaves like a real engine in everything that the controller can observe: it generates whether or not the tokens are
consumed, yields everything since the last yield, and lists the k best raw log-probs of each position. Its creator
chooses the duration of calls, and which call fails or hangs. Does not know about Ray, roles or policies.

V = vocabulary, n = tokens, k = length of a top-k list.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from common.seeds import derive_seed
from common.sequence import FinishReason, Floats, Ids, TopLogprobs
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

_MAX_CACHED_ROWS = 4096


class ScriptedError(EngineCallError):
    """The failure that a Fault requests."""


class Script(Protocol):
    """Replaces a model. The same text always gives the same row."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, or None for a script that never ends by itself."""
        ...

    def next_logprobs(self, text: Ids) -> Floats:
        """[V] nats of the token that follows the text."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedScript:
    """Pseudo-random distributions that depend only on the last ``order`` tokens."""

    vocabulary_size: int
    seed: int
    sharpness: float = 2.0  # standard deviation of the logits; 0 is uniform
    order: int = 3
    eos_token_id: int = 0
    eos_probability: float = 0.03  # after every text, so that sequences end at different lengths; > 0

    def next_logprobs(self, text: Ids) -> Floats:
        return _hashed_row(self, tuple(text[-self.order :].tolist()))

    def student(
        self, *, seed: int, difference: float = 0.02, spike_rate: float = 0.1, spike: float = 0.95
    ) -> "BlendedScript":
        """A script that mostly agrees with this one. See BlendedScript."""
        return BlendedScript(
            teacher=self, other=replace(self, seed=seed), difference=difference, spike_rate=spike_rate, spike=spike
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendedScript:
    """A mixture of a teacher's script and another: the other's share is small, but large after some texts.

    So the divergence from the teacher has spikes, as between a real student and its teacher.
    """

    teacher: HashedScript
    other: HashedScript
    difference: float  # share of the other script outside spikes
    spike_rate: float  # share of texts that are followed by a spike
    spike: float  # share of the other script in spikes

    @property
    def eos_token_id(self) -> int:
        return self.teacher.eos_token_id

    def next_logprobs(self, text: Ids) -> Floats:
        order = max(self.teacher.order, self.other.order)
        return _blended_row(self, tuple(text[-order:].tolist()))


@lru_cache(_MAX_CACHED_ROWS)
def _hashed_row(script: HashedScript, context: tuple[int, ...]) -> Floats:
    rng = np.random.default_rng(derive_seed(script.seed, *context))
    logits = rng.normal(0.0, script.sharpness, script.vocabulary_size)
    logits[script.eos_token_id] = -np.inf
    others = logits - np.logaddexp.reduce(logits) + math.log1p(-script.eos_probability)
    others[script.eos_token_id] = math.log(script.eos_probability)
    return _frozen(others)


@lru_cache(_MAX_CACHED_ROWS)
def _blended_row(script: BlendedScript, context: tuple[int, ...]) -> Floats:
    is_spike = derive_seed("spike", script.other.seed, *context) < script.spike_rate * 2**63
    share = script.spike if is_spike else script.difference
    text = np.array(context, np.int32)
    p, q = (np.exp(part.next_logprobs(text).astype(np.float64)) for part in (script.teacher, script.other))
    return _frozen(np.log((1.0 - share) * p + share * q))


def _frozen(row: npt.NDArray[np.float64]) -> Floats:
    """A read-only float32 copy: the cache returns the same array to all callers."""
    shared = row.astype(np.float32)
    shared.flags.writeable = False
    return shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault at the engine's n-th call of a kind: the call raises ScriptedError, or never returns."""

    call: Literal["write", "score"]
    number: int  # 1 for the first call
    hangs: bool = False


class ScriptedEngine:
    """Implements the Engine protocol with a script.

    ``delay`` returns the seconds to wait before each generated chunk and before each score. ``script_of`` returns the
    script for a weight update; without it an update only changes the version. Requests for more than ``max_model_len``
    tokens raise ValueError.
    """

    def __init__(
        self,
        script: Script,
        *,
        top_logprobs: int,
        max_model_len: int | None = None,
        delay: Callable[[], float] = lambda: 0.0,
        script_of: Callable[[WeightUpdate], Script] | None = None,
        fault: Fault | None = None,
    ) -> None:
        self._script = script
        self._top_logprobs = top_logprobs
        self._max_model_len = max_model_len
        self._delay = delay
        self._script_of = script_of
        self._fault = fault
        self.weight_version = 0
        self.num_calls = {"write": 0, "score": 0}
        self.num_running = 0  # calls that have not finished
        self.num_scored_rows = 0
        self.num_written_tokens = 0
        self.num_untaken_tokens = 0  # generated but never yielded, because the stream was closed

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, GoOn | None]:
        pieces: list[Written] = []
        updated = asyncio.Event()
        wanted: asyncio.Queue[GoOn] = asyncio.Queue(1)
        with self._call("write") as number:
            writing = asyncio.create_task(self._write(request, number, pieces, updated, wanted))
            try:
                finish_reason, num_taken, pause_after = None, 0, request.pause_after
                while finish_reason is None:
                    await updated.wait()
                    updated.clear()
                    if not pieces:
                        writing.result()  # raises the error that ended the generation
                    written = concatenate_written(pieces)
                    pieces.clear()
                    finish_reason = written.finish_reason
                    go_on = (yield written) or GoOn()
                    num_taken += len(written)
                    if num_taken == pause_after:
                        pause_after = go_on.pause_after(num_taken)
                        wanted.put_nowait(go_on)
            finally:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
                self.num_untaken_tokens += sum(map(len, pieces))

    async def generate(self, request: WriteRequest) -> Written:
        return await write_whole(self, request)

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        with self._call("score") as number:
            await self._start("score", number, request.token_ids.size + 1)
            await asyncio.sleep(self._delay())
            ends = range(request.start, request.token_ids.size + 1)
            rows = [self._script.next_logprobs(request.token_ids[:end]) for end in ends]
            self.num_scored_rows += len(rows)
            return _best(rows, self._top_logprobs)

    async def load_weights(self, update: WeightUpdate) -> None:
        if self._script_of is not None:
            self._script = self._script_of(update)
        self.weight_version = update.version

    @contextmanager
    def _call(self, kind: Literal["write", "score"]) -> Iterator[int]:
        """Count a call and yield its number."""
        self.num_calls[kind] += 1
        self.num_running += 1
        try:
            yield self.num_calls[kind]
        finally:
            self.num_running -= 1

    async def _start(self, kind: Literal["write", "score"], number: int, num_tokens: int) -> None:
        if self._max_model_len is not None and num_tokens > self._max_model_len:
            raise ValueError(f"{kind} needs {num_tokens} tokens, the context length is {self._max_model_len}")
        fault = self._fault
        if fault is not None and (fault.call, fault.number) == (kind, number):
            if fault.hangs:
                await asyncio.Event().wait()
            raise ScriptedError(f"{kind} {number} fails as scripted")

    async def _write(
        self,
        request: WriteRequest,
        number: int,
        pieces: list[Written],
        updated: asyncio.Event,
        wanted: "asyncio.Queue[GoOn]",
    ) -> None:
        """Consumes the consumer's resume messages; produces pieces whether or not they are read; waits for the delay
        and at pauses; stops at the end of the text or when cancelled.
        """
        try:
            await self._start("write", number, request.prefix.size + request.max_tokens)
            text, rng = request.prefix, np.random.default_rng(request.seed)
            finish_reason, num_written, pause_after = None, 0, request.pause_after
            while finish_reason is None:
                await asyncio.sleep(self._delay())
                num_tokens = request.chunk_tokens
                if pause_after is not None:
                    num_tokens = min(num_tokens, pause_after - num_written)
                piece = self._write_chunk(text, request, rng, num_tokens)
                text = np.concatenate([text, piece.token_ids])
                finish_reason, num_written = piece.finish_reason, num_written + len(piece)
                self.num_written_tokens += len(piece)
                pieces.append(piece)
                updated.set()
                if num_written == pause_after:
                    go_on = await wanted.get()
                    pause_after = go_on.pause_after(num_written)
                    if go_on.token_id is not None:
                        text = np.append(text[:-1], np.int32(go_on.token_id))
        finally:
            updated.set()

    def _write_chunk(self, text: Ids, request: WriteRequest, rng: np.random.Generator, num_tokens: int) -> Written:
        """The next tokens after ``text``, which starts with the request's prefix."""
        rows: list[Floats] = []
        token_ids: list[int] = []
        finish_reason: FinishReason | None = None
        while finish_reason is None and len(rows) < num_tokens:
            rows.append(self._script.next_logprobs(text))
            token_ids.append(_sample(rows[-1], request, rng))
            text = np.append(text, np.int32(token_ids[-1]))
            ends = token_ids[-1] == self._script.eos_token_id or token_ids[-1] in request.stop_token_ids
            if ends and not request.ignore_eos:
                finish_reason = "stop"
            elif text.size == request.prefix.size + request.max_tokens:
                finish_reason = "length"
        return Written(
            token_ids=np.array(token_ids, np.int32),
            logprobs=np.array([row[token_id] for row, token_id in zip(rows, token_ids, strict=True)], np.float32),
            top=_best(rows, self._top_logprobs),
            weight_version=self.weight_version,
            finish_reason=finish_reason,
        )


def _best(rows: list[Floats], k: int) -> TopLogprobs:
    """[n, k] The k best log-probs of [V] rows. Ties are ordered by id."""
    logprobs_NV = np.stack(rows)
    token_ids_NK = np.argsort(-logprobs_NV, axis=1, kind="stable")[:, :k]
    return TopLogprobs(token_ids_NK.astype(np.int32), np.take_along_axis(logprobs_NV, token_ids_NK, axis=1))


def _sample(row: Floats, request: WriteRequest, rng: np.random.Generator) -> int:
    """The best token at temperature 0, otherwise a token sampled with top-p."""
    if request.excluded_token_ids:
        row = row.copy()
        row[list(request.excluded_token_ids)] = -np.inf
    best_first = np.argsort(-row, kind="stable")
    if request.temperature == 0.0:
        return int(best_first[0])
    logits = row[best_first].astype(np.float64) / request.temperature
    mass = np.exp(logits - logits[0]).cumsum()
    nucleus = int(np.searchsorted(mass, request.top_p * mass[-1])) + 1
    drawn = np.searchsorted(mass[:nucleus], rng.random() * mass[:nucleus][-1], side="right")
    return int(best_first[drawn])
