"""The real engine: vLLM's AsyncLLM behind the Engine protocol. The only module that runs vLLM.

Owns what vLLM must be started with so that its answers mean what the protocol says (raw log-probs, enough of them, no
detokenisation), and the conversion of its rows to numpy. Knows nothing of Ray, roles or policies.

n = tokens, k = length of a top list. A flat row of vLLM holds k + 1 entries: the token itself, then the k best.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import replace
from itertools import count
from typing import Self

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.inputs import TokensPrompt
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from common.cores import children_on_cores
from common.sequence import Ids, TopLogprobs
from common.weights import WeightUpdate
from rollout_server.engines.protocol import (
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
from rollout_server.engines.vllm_plugin.weight_transfer import apply_update, engine_backend, init_transfer

_CPU_BLOCK_TOKENS = 16  # see ``cpu_attention``
_CPU_CACHE_GIB = 1.0
_NEVER = -100.0  # the logit bias vLLM allows that comes closest to minus infinity


class VLLMEngine:
    """One AsyncLLM. Make it with ``start``, end it with ``shutdown``."""

    def __init__(self, llm: AsyncLLM, top_logprobs: int) -> None:
        self._llm = llm
        self._top_logprobs = top_logprobs
        cache = llm.vllm_config.cache_config
        self._block_tokens = int(cache.block_size)
        self._room = CacheRoom(int(cache.num_gpu_blocks) * self._block_tokens)
        self._request_numbers = count()
        self.weight_version = 0

    @classmethod
    def start(cls, spec: EngineSpec) -> Self:
        """Load the model and start vLLM's processes. Must run inside a running event loop.

        Raises what vLLM raises when the model can't be loaded or the memory does not suffice.
        """
        args = _engine_args(spec)
        with _process_environment(spec):
            llm = AsyncLLM.from_engine_args(args)
        vocabulary = llm.model_config.get_vocab_size()
        assert llm.model_config.logprobs_mode == "raw_logprobs", llm.model_config.logprobs_mode
        return cls(llm, min(spec.top_logprobs, vocabulary))

    @property
    def facts(self) -> EngineFacts:
        """What was chosen where the settings left a choice."""
        model = self._llm.model_config
        return EngineFacts(
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=int(model.max_model_len),
            top_logprobs=self._top_logprobs,
        )

    @property
    def num_running(self) -> int:
        """Requests not finished yet."""
        return int(self._llm.output_processor.get_num_unfinished_requests())

    @property
    def failure(self) -> str | None:
        """Why it can't go on: vLLM's own process is gone."""
        return "vLLM's engine process is dead" if self._llm.errored else None

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
        async with aclosing(self._llm.generate(_prompt(request.prefix), params, self._request_id())) as outputs:
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
        async with aclosing(self._llm.generate(inputs(), params, self._request_id())) as outputs:
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
        """See the protocol. Reads the prefix cache; asks again without it when a needed row was served from there.

        vLLM returns whatever lies in memory for the rows of cached tokens: the row of position j needs the state of
        token j - 1, so it is valid only where fewer than j tokens were cached.
        """
        output = await self._read(request, skip_cache=False)
        if request.num_rows > 1 and (output.num_cached_tokens or 0) >= request.start:
            output = await self._read(request, skip_cache=True)
        next_row = _rows(output.outputs[0].logprobs, 0, 1, self._top_logprobs)
        if request.num_rows == 1:
            return next_row
        read = _rows(output.prompt_logprobs, request.start, request.token_ids.size, self._top_logprobs)
        return TopLogprobs.concatenate([read, next_row])

    async def init_weight_transfer(self, transfer_info: Mapping[str, object]) -> None:
        """Open this engine's end of the weight transfer, once, before the first update."""
        await init_transfer(self._llm, transfer_info)

    async def load_weights(self, update: WeightUpdate) -> None:
        """See the protocol. Streams with pauses end before: vLLM can't take the old weights' cache from them."""
        async with self._room.hold_all():
            await apply_update(self._llm, update)
            self.weight_version = update.version

    def shutdown(self) -> None:
        """End vLLM's processes."""
        self._llm.shutdown()

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
        async with aclosing(self._llm.generate(_prompt(request.token_ids), params, self._request_id())) as outputs:
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
        num_tokens = len(output.token_ids)
        own_entries = output.logprobs.start_indices
        assert output.finish_reason in (None, "stop", "length"), f"vLLM ended a request with {output.finish_reason}"
        return Written(
            token_ids=np.asarray(output.token_ids, np.int32),
            logprobs=np.asarray(output.logprobs.logprobs, np.float32)[own_entries],
            top=_rows(output.logprobs, 0, num_tokens, self._top_logprobs),
            weight_version=self.weight_version,
            finish_reason=output.finish_reason,
        )

    def _request_id(self) -> str:
        return str(next(self._request_numbers))


def _prompt(token_ids: Ids) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=token_ids.tolist())


def _rows(flat: FlatLogprobs, first: int, end: int, k: int) -> TopLogprobs:
    """Rows first..end-1 of vLLM's flat lists, without each row's leading own entry.

    Where vLLM merged deltas that nobody had taken yet, it drops the second entry of an own token among the k best; such
    a row is one entry short and out of order at its head.
    """
    starts, ends = np.asarray(flat.start_indices[first:end]), np.asarray(flat.end_indices[first:end])
    lengths, wanted = ends - starts, slice(starts[0], ends[-1])
    token_ids, logprobs = np.asarray(flat.token_ids[wanted], np.int32), np.asarray(flat.logprobs[wanted], np.float32)
    entries = (starts - starts[0] + (lengths == k + 1))[:, None] + np.arange(k)
    top_ids, top_logprobs = token_ids[entries], logprobs[entries]
    if (lengths == k).any():
        order = np.argsort(-top_logprobs, axis=1, kind="stable")
        top_ids, top_logprobs = np.take_along_axis(top_ids, order, 1), np.take_along_axis(top_logprobs, order, 1)
    return TopLogprobs(top_ids, top_logprobs)


def _engine_args(spec: EngineSpec) -> AsyncEngineArgs:
    settings = spec.settings
    args = AsyncEngineArgs(
        model=spec.model,
        trust_remote_code=spec.trust_remote_code,
        load_format="safetensors",  # by itself vLLM takes pickled weights where there are no others
        dtype=settings.dtype if settings.dtype != "auto" else _best_dtype(),
        tensor_parallel_size=settings.tensor_parallel_size,
        # Its own processes on the actor's GPUs. Left to itself vLLM sees Ray's placement group and asks it for more.
        distributed_executor_backend="mp" if settings.tensor_parallel_size > 1 else None,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enforce_eager=settings.enforce_eager,
        enable_prefix_caching=True,
        max_logprobs=-1,  # no limit: k is ours to choose
        logprobs_mode="raw_logprobs",
        disable_log_stats=True,
    )
    if spec.weight_transfer_backend is not None:
        args.weight_transfer_config = WeightTransferConfig(backend=engine_backend(spec.weight_transfer_backend))
    if current_platform.is_cpu():
        args.kv_cache_memory_bytes = int((settings.kv_cache_gib or _CPU_CACHE_GIB) * 2**30)
        args.block_size = _CPU_BLOCK_TOKENS
        # A seeded request whose prompt is prefilled in pieces ends the CPU engine, so prompts go in whole.
        args.enable_chunked_prefill = False
        args.max_num_batched_tokens = max(8192, args.create_model_config().max_model_len)
    return args


def _best_dtype() -> str:
    """bfloat16 wherever the hardware computes in it, else float32, which is far faster there."""
    if current_platform.is_cpu() and not torch.cpu._is_avx512_bf16_supported():
        return "float32"
    return "bfloat16"


@contextmanager
def _process_environment(spec: EngineSpec) -> Iterator[None]:
    """What vLLM's own processes take over at their start: the environment, and the cores they may run on. Put back
    afterwards.

    Their titles tell whose they are: ``student::EngineCore``, ``teacher::Worker``.
    """
    wanted = {"VLLM_PROCESS_NAME_PREFIX": spec.name}
    if current_platform.is_cpu():
        wanted |= {"OMP_NUM_THREADS": str(spec.settings.num_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    cores = spec.settings.cpu_cores or os.sched_getaffinity(0)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with children_on_cores(cores):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
