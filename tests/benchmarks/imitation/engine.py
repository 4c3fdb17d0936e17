"""An engine that takes the time of an accelerator and computes nothing. For planning how much one controller serves.

What it writes is drawn from a table (``speeds``); how long that takes is the virtual device's (``accelerator``). It
ends what is dropped, and fails or hangs where a Fault says so. Knows nothing of Ray, roles or policies.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from common.sequence import FinishReason, Floats, Ids, TopLogprobs
from common.weights import WeightUpdate
from rollout_server.engines.protocol import (
    EngineFacts,
    EngineSpec,
    GoOn,
    ScoreRequest,
    WriteRequest,
    Written,
    write_whole,
)
from rollout_server.engines.scripted import Fault, ScriptedError
from tests.benchmarks.imitation.accelerator import Accelerator, DeviceCounters, Work
from tests.benchmarks.imitation.speeds import EOS_TOKEN_ID, AcceleratorSpeeds, RowTable

_DEFAULT_MODEL_LEN = 32_768


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plan:
    """All that a request will write, were it never dropped. n tokens."""

    row_numbers: npt.NDArray[np.int64]  # [n]
    token_ids: Ids  # [n]
    logprobs: Floats  # [n] nats
    finish_reason: FinishReason


class ImitatedEngine:
    """Engine protocol over an imitated accelerator. Requests beyond the context raise ValueError."""

    def __init__(
        self,
        speeds: AcceleratorSpeeds,
        *,
        top_logprobs: int,
        max_num_seqs: int,
        max_model_len: int = _DEFAULT_MODEL_LEN,
        fault: Fault | None = None,
    ) -> None:
        top_logprobs = min(top_logprobs, speeds.text.vocabulary_size)
        self.facts = EngineFacts(dtype="imitated", max_model_len=max_model_len, top_logprobs=top_logprobs)
        self._table = RowTable(speeds.text, top_logprobs)
        self._device = Accelerator(speeds, max_num_seqs=max_num_seqs, max_text=max_model_len)
        self._fault = fault
        self._num_calls = {"write": 0, "score": 0}
        self.num_running = 0  # calls that have not ended yet
        self.failure: str | None = None
        self.weight_version = 0

    @classmethod
    def start(cls, spec: EngineSpec, speeds: AcceleratorSpeeds) -> Self:
        """An engine of these speeds, in the settings of ``spec``."""
        return cls(
            speeds,
            top_logprobs=spec.top_logprobs,
            max_num_seqs=spec.settings.max_num_seqs,
            max_model_len=spec.settings.max_model_len or _DEFAULT_MODEL_LEN,
        )

    @property
    def counters(self) -> DeviceCounters:
        return self._device.counters

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, GoOn | None]:
        """See the protocol. Pieces end at pauses or where the whole text's length is a multiple of ``chunk_tokens``."""
        with self._call("write"):
            await self._start("write", request.prefix.size + request.max_tokens)
            plan = self._plan(request)
            num_tokens = plan.token_ids.size
            first_end = request.chunk_tokens - request.prefix.size % request.chunk_tokens
            ends: Iterable[int] = range(first_end, num_tokens, request.chunk_tokens)
            if request.pause_after is not None:
                ends = (request.pause_after,)
            work = Work(
                text=request.prefix,
                num_tokens=num_tokens,
                piece_ends=deque([*(end for end in ends if end < num_tokens), num_tokens]),
                pause_after=request.pause_after,
            )
            self._device.submit(work)
            num_taken, text = 0, plan.token_ids.copy()
            try:
                while num_taken < num_tokens:
                    await work.news.wait()
                    work.news.clear()
                    piece, num_taken = slice(num_taken, work.num_reported), work.num_reported
                    go_on = (yield Written(
                        token_ids=plan.token_ids[piece],
                        logprobs=plan.logprobs[piece],
                        top=self._table.rows(plan.row_numbers[piece]),
                        weight_version=self.weight_version,
                        finish_reason=plan.finish_reason if num_taken == num_tokens else None,
                    )) or GoOn()  # fmt: skip
                    if num_taken == work.pause_after and num_taken < num_tokens:
                        if go_on.token_id is not None:
                            text[num_taken - 1] = go_on.token_id
                        self._device.resume(work, go_on.pause_after(num_taken))
            finally:
                self._device.drop(work)
                if work.num_reported:
                    text = np.concatenate([request.prefix, text[: work.num_reported - 1]])
                    hashes = self._device.cache.hashes(text)
                    self._device.cache.add(hashes, 0 if work.hashes is None else work.hashes.size)

    async def generate(self, request: WriteRequest) -> Written:
        return await write_whole(self, request)

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        with self._call("score"):
            await self._start("score", request.token_ids.size + 1)
            needs_row = request.start if request.num_rows > 1 else request.token_ids.size
            work = Work(text=request.token_ids, needs_row=needs_row, piece_ends=deque([1]))
            self._device.submit(work)
            try:
                await work.news.wait()
            finally:
                self._device.drop(work)
            numbers = self._table.row_numbers(int(request.token_ids[0]), request.start, request.token_ids.size + 1)
            return self._table.rows(numbers)

    async def load_weights(self, update: WeightUpdate) -> None:
        """The version and an empty cache; the text stays the same."""
        self._device.cache.clear()
        self.weight_version = update.version

    async def init_weight_transfer(self, transfer_info: Mapping[str, object]) -> None:
        """Nothing is transferred."""

    def shutdown(self) -> None:
        """Nothing outlives this process."""

    @contextmanager
    def _call(self, kind: str) -> Iterator[None]:
        self._num_calls[kind] += 1
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1

    async def _start(self, kind: str, num_tokens: int) -> None:
        if num_tokens > self.facts.max_model_len:
            raise ValueError(f"{kind} needs {num_tokens} tokens, the context length is {self.facts.max_model_len}")
        if self._fault is not None and (self._fault.call, self._fault.number) == (kind, self._num_calls[kind]):
            if self._fault.hangs:
                await asyncio.Event().wait()
            raise ScriptedError(f"{kind} {self._fault.number} fails as scripted")

    def _plan(self, request: WriteRequest) -> _Plan:
        start = request.prefix.size
        numbers = self._table.row_numbers(int(request.prefix[0]), start, start + request.max_tokens)
        token_ids, logprobs = self._table.draw(
            numbers,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            excluded=request.excluded_token_ids,
        )
        ends = np.isin(token_ids, () if request.ignore_eos else (EOS_TOKEN_ID, *request.stop_token_ids))
        num_tokens = int(ends.argmax()) + 1 if ends.any() else request.max_tokens
        return _Plan(
            row_numbers=numbers[:num_tokens],
            token_ids=token_ids[:num_tokens],
            logprobs=logprobs[:num_tokens],
            finish_reason="stop" if ends.any() else "length",
        )
