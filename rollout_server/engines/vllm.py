"""The real engine: vLLM's AsyncLLM behind the Engine protocol. The only module that runs vLLM.

Owns the requests; ``vllm_args`` decides what vLLM is started with, and ``rows`` turns its log-probs into arrays. Knows
nothing of Ray, roles or policies.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import count
from typing import Self

import numpy as np
import torch
from vllm import SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.inputs import TokensPrompt
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineGenerateError

from common.cores import children_on_cores
from common.sequence import Ids, TopLogprobs
from common.weights import WeightUpdate
from rollout_server.engines.protocol import (
    EngineCallError,
    EngineFacts,
    EngineSpec,
    GoOn,
    ScoreRequest,
    WriteRequest,
    Written,
    concatenate_written,
    next_piece,
    write_whole,
)
from rollout_server.engines.room import CacheRoom
from rollout_server.engines.rows import own_logprobs, prompt_rows, top_rows
from rollout_server.engines.vllm_args import Hardware, engine_config, engine_environment
from rollout_server.engines.vllm_plugin.weight_transfer import WeightsLost, apply_update, init_transfer

_SESSION, _INTERRUPTIBLE = 0, 1
"""Priorities. Where the cache is full, vLLM takes blocks from a request of the highest number. Not from a session: its
asynchronous scheduler drops one, and its text, that it interrupts while the last step of a turn is in flight."""

_NEVER = -100.0  # the logit bias vLLM allows that comes closest to minus infinity


class VLLMEngine:
    """One AsyncLLM. Make it with ``start``, end it with ``shutdown``."""

    def __init__(self, llm: AsyncLLM, top_logprobs: int) -> None:
        self._llm = llm
        self._top_logprobs = top_logprobs
        cache = llm.vllm_config.cache_config
        self._block_tokens = int(cache.block_size)
        self._room = CacheRoom((int(cache.num_gpu_blocks) - 1) * self._block_tokens)  # vLLM keeps one block empty
        self._request_numbers = count()
        self._weights_lost: str | None = None
        self.weight_version = 0

    @classmethod
    def start(cls, spec: EngineSpec) -> Self:
        """Load the model and start vLLM's processes. Must run inside a running event loop.

        Raises UserError for settings that vLLM refuses, and what vLLM raises when the model can't be loaded or the
        memory does not suffice.
        """
        hardware = Hardware.detect()
        cores = spec.settings.cpu_cores or os.sched_getaffinity(0)
        with _processes_with(engine_environment(spec, hardware), cores):
            llm = AsyncLLM.from_vllm_config(engine_config(spec, hardware), disable_log_stats=True)
        vocabulary = llm.model_config.get_vocab_size()
        assert llm.model_config.logprobs_mode == "raw_logprobs", llm.model_config.logprobs_mode
        return cls(llm, min(spec.top_logprobs, vocabulary))

    @property
    def facts(self) -> EngineFacts:
        """What was chosen where the settings left a choice."""
        model = self._llm.model_config
        return EngineFacts(
            dtype=_name_of(model.dtype),
            max_model_len=int(model.max_model_len),
            top_logprobs=self._top_logprobs,
        )

    @property
    def num_running(self) -> int:
        """Requests not finished yet."""
        return int(self._llm.output_processor.get_num_unfinished_requests())

    @property
    def failure(self) -> str | None:
        """Why it must be restarted: vLLM's own process is gone, or an update left it without weights."""
        return self._weights_lost or ("vLLM's engine process is dead" if self._llm.errored else None)

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, GoOn | None]:
        """See the protocol. Pieces end where the whole text's length is a multiple of ``chunk_tokens``.

        Whoever reads the text along then finds its cached blocks ending there too, and computes no token twice (where
        ``chunk_tokens`` is a multiple of vLLM's block).
        """
        if request.pause_after is not None:
            # Up to all that it may write, in whole blocks.
            num_blocks = -(-(request.prefix.size + request.max_tokens) // self._block_tokens)
            room = self._room.hold(num_blocks * self._block_tokens)
            async with room, aclosing(self._stream_in_turns(request)) as pieces:
                go_on = None
                while (piece := await next_piece(pieces, go_on)) is not None:
                    go_on = yield piece
            return
        params = self._write_params(request, RequestOutputKind.DELTA)
        held: list[Written] = []
        num_wanted = request.chunk_tokens - request.prefix.size % request.chunk_tokens
        async with self._outputs(_prompt(request.prefix), params) as outputs:
            async for output in outputs:
                held.append(self._written(output.outputs[0]))
                num_held = sum(map(len, held))
                if held[-1].finish_reason is not None:
                    yield concatenate_written(held)
                elif num_held >= num_wanted:
                    written, end = concatenate_written(held), num_held - (num_held - num_wanted) % request.chunk_tokens
                    yield written[:end]
                    held = [written[end:]] if end < num_held else []
                    num_wanted = request.chunk_tokens

    async def _stream_in_turns(self, request: WriteRequest) -> AsyncGenerator[Written, GoOn | None]:
        """A stream with pauses: one session of vLLM, a turn from pause to pause.

        Between turns the session keeps its cache, its random state and its place among ``max_num_seqs``. Its next turn
        begins with the last token of the one before, which vLLM has sampled but not yet read, or with the one that the
        reader puts in its place.
        """
        turns: asyncio.Queue[StreamingInput] = asyncio.Queue(1)

        async def inputs() -> AsyncGenerator[StreamingInput, None]:
            while True:
                yield await turns.get()

        def turn(prompt: Ids, num_tokens: int) -> StreamingInput:
            params = self._write_params(replace(request, max_tokens=num_tokens), RequestOutputKind.DELTA)
            params.stream_interval = num_tokens  # nobody takes a part of a turn
            return StreamingInput(prompt=_prompt(prompt), sampling_params=params)

        params = self._write_params(request, RequestOutputKind.DELTA)
        prompt, num_written, pause_after = request.prefix, 0, request.pause_after
        async with self._outputs(inputs(), params, priority=_SESSION) as outputs:
            while True:
                end = min(pause_after or request.max_tokens, request.max_tokens)
                turns.put_nowait(turn(prompt, end - num_written))
                held: list[Written] = []
                while num_written < end and not (held and held[-1].finish_reason == "stop"):
                    held.append(self._written((await anext(outputs)).outputs[0]))
                    num_written += len(held[-1])
                written = concatenate_written(held)
                if written.finish_reason == "stop" or end == request.max_tokens:
                    yield written
                    return
                go_on = (yield replace(written, finish_reason=None)) or GoOn()
                pause_after = go_on.pause_after(num_written)
                prompt = written.token_ids[-1:] if go_on.token_id is None else np.array([go_on.token_id], np.int32)

    async def generate(self, request: WriteRequest) -> Written:
        return await write_whole(self, request)

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        """See the protocol. Reads the prefix cache; asks again without it when a needed row was served from there."""
        output = await self._read(request, skip_cache=False)
        if request.num_rows == 1:
            return self._next_row(output)
        rows = self._prompt_rows(output, request)
        if rows is None:
            output = await self._read(request, skip_cache=True)
            rows = self._prompt_rows(output, request)
        if rows is None:
            raise RuntimeError(
                f"vLLM read a text of {request.token_ids.size} tokens without its cache and returned "
                f"{len(output.prompt_logprobs)} rows; expected each token's own from {request.start} on"
            )
        return TopLogprobs.concatenate([rows, self._next_row(output)])

    def _prompt_rows(self, output: RequestOutput, request: ScoreRequest) -> TopLogprobs | None:
        num_cached = output.num_cached_tokens or 0
        return prompt_rows(
            output.prompt_logprobs, request.token_ids, request.start, self._top_logprobs, num_cached=num_cached
        )

    def _next_row(self, output: RequestOutput) -> TopLogprobs:
        """Of the token to come: every request samples one."""
        return top_rows(output.outputs[0].logprobs, 0, 1, self._top_logprobs)

    async def init_weight_transfer(self, transfer_info: Mapping[str, object]) -> None:
        """Open this engine's end of the weight transfer, once, before the first update."""
        await init_transfer(self._llm, transfer_info)

    async def load_weights(self, update: WeightUpdate) -> None:
        """See the protocol. Streams with pauses end before: vLLM can't take the old weights' cache from them.

        Raises UpdateRefused where the engine goes on under the weights it had. After WeightsLost it is of no use: every
        call under way and every later one raises EngineCallError, and ``failure`` says why.
        """
        async with self._room.hold_all():
            self._check_weights()
            try:
                await apply_update(self._llm, update)
            except WeightsLost as lost:
                self._weights_lost = str(lost)
                self._llm.output_processor.propagate_error(lost)
                raise
            self.weight_version = update.version

    def shutdown(self) -> None:
        """End vLLM's processes."""
        self._llm.shutdown()

    @asynccontextmanager
    async def _outputs(
        self,
        prompt: TokensPrompt | AsyncGenerator[StreamingInput, None],
        params: SamplingParams,
        *,
        priority: int = _INTERRUPTIBLE,
    ) -> AsyncGenerator[AsyncGenerator[RequestOutput, None], None]:
        """What vLLM answers to a request, which ends when the block is left."""
        self._check_weights()
        answers = self._llm.generate(prompt, params, str(next(self._request_numbers)), priority=priority)
        try:
            async with aclosing(answers) as outputs:
                yield outputs
        except EngineGenerateError as error:
            if self._weights_lost is not None:
                raise EngineCallError(self._weights_lost) from error
            raise

    def _check_weights(self) -> None:
        if self._weights_lost is not None:
            raise EngineCallError(self._weights_lost)

    async def _read(self, request: ScoreRequest, *, skip_cache: bool) -> RequestOutput:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            logprobs=self._top_logprobs,
            prompt_logprobs=self._top_logprobs if request.num_rows > 1 else None,
            flat_logprobs=True,
            detokenize=False,
            skip_reading_prefix_cache=skip_cache,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with self._outputs(_prompt(request.token_ids), params) as outputs:
            async for output in outputs:
                return output  # FINAL_ONLY: the first is the last
        raise RuntimeError("vLLM ended a score request without an output")

    def _write_params(self, request: WriteRequest, output_kind: RequestOutputKind) -> SamplingParams:
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed if request.temperature > 0 else None,
            max_tokens=request.max_tokens,
            stop_token_ids=list(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            logit_bias=dict.fromkeys(request.excluded_token_ids, _NEVER) or None,
            logprobs=self._top_logprobs,
            flat_logprobs=True,
            detokenize=False,
            stream_interval=max(1, request.chunk_tokens // 4),  # a piece ends at most this many tokens late
            output_kind=output_kind,
        )

    def _written(self, output: CompletionOutput) -> Written:
        assert output.finish_reason in (None, "stop", "length"), f"vLLM ended a request with {output.finish_reason}"
        return Written(
            token_ids=np.asarray(output.token_ids, np.int32),
            logprobs=own_logprobs(output.logprobs),
            top=top_rows(output.logprobs, 0, len(output.token_ids), self._top_logprobs),
            weight_version=self.weight_version,
            finish_reason=output.finish_reason,
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _prompt(token_ids: Ids) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=token_ids.tolist())


@contextmanager
def _processes_with(environment: Mapping[str, str], cores: Iterable[int]) -> Iterator[None]:
    """What vLLM's own processes take over at their start: the environment, and the cores they may run on. Put back
    afterwards.
    """
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        with children_on_cores(cores):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
