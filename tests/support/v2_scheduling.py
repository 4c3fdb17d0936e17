"""vLLM's asynchronous scheduler and its front end, with a worker that is told which tokens it samples.

Two steps are in flight, as on GPUs: the second is scheduled before the first has brought its tokens.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from common.sequence import Ids

DEPTH = 2  # steps in flight
BLOCK = 16
EOS_ID = 2
_MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "models" / "student"


class AsyncEngine:
    """A scheduler and its requests. ``sample(req_id, position)`` is the token that is sampled for a position."""

    def __init__(self, sample: Callable[[str, int], int], *, num_blocks: int = 64, **settings: object) -> None:
        settings = {"max_num_batched_tokens": 64, "max_num_seqs": 16} | settings
        config = EngineArgs(model=str(_MODEL), dtype="float32", block_size=BLOCK, **settings).create_engine_config()
        config.scheduler_config.async_scheduling = True  # which vLLM switches off on processors
        config.cache_config.num_gpu_blocks = num_blocks
        assert config.scheduler_config.get_scheduler_cls() is AsyncScheduler
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")  # refused before, for lack of Triton
            self.scheduler = AsyncScheduler(
                vllm_config=config,
                kv_cache_config=KVCacheConfig(
                    num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
                ),
                structured_output_manager=StructuredOutputManager(config),
                block_size=BLOCK,
            )
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._block_hasher = get_request_block_hasher(BLOCK, hash_function)
        self._sample = sample
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._num_computed: dict[str, int] = {}
        self._prefill_lens: dict[str, int] = {}
        self._front_end = OutputProcessor(tokenizer=None, log_stats=False)
        self.queues: dict[str, RequestOutputCollector] = {}
        self.new_requests: list[NewRequestData] = []  # as the worker got them
        self.core_outputs: list[EngineCoreOutput] = []  # as the front end got them

    def add(
        self, req_id: str, prompt: Ids, params: SamplingParams, *, resumable: bool = False, priority: int = 0
    ) -> None:
        request = EngineCoreRequest(
            request_id=req_id,
            external_req_id=req_id,
            prompt_token_ids=prompt.tolist(),
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            resumable=resumable,
            priority=priority,
        )
        params.update_from_generation_config({}, EOS_ID)
        queue = self.queues.setdefault(req_id, RequestOutputCollector(params.output_kind, req_id))
        self._front_end.add_request(request, None, queue=queue)
        self.scheduler.add_request(Request.from_engine_core_request(request, self._block_hasher))

    def abort(self, req_id: str) -> None:
        self._front_end.abort_requests([req_id], internal=True)
        self.scheduler.finish_requests(req_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """Schedule while there is room in flight, then take the oldest step's tokens. As vLLM's engine core does."""
        while len(self._in_flight) < DEPTH and self.scheduler.has_requests():
            scheduled = self.scheduler.schedule()
            if not scheduled.num_scheduled_tokens:
                break
            self._in_flight.append((scheduled, self._run(scheduled)))
        if self._in_flight:
            outputs = self.scheduler.update_from_output(*self._in_flight.popleft())
            for core_outputs in outputs.values():
                self.core_outputs.extend(core_outputs.outputs)
                self._front_end.process_outputs(core_outputs.outputs)

    def run(self, num_steps: int = 30) -> None:
        for _ in range(num_steps):
            self.step()

    def take(self, req_id: str) -> list[RequestOutput]:
        outputs = []
        while (output := self.queues[req_id].get_nowait()) is not None:
            outputs.append(output)
        return outputs

    def _run(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """As Model Runner V2: a request that comes again is a new one; a piece of a prompt brings no token."""
        for data in scheduled.scheduled_new_reqs:
            self.new_requests.append(replace(data, prefill_token_ids=[*data.prefill_token_ids]))
            self._num_computed[data.req_id] = data.num_computed_tokens
            self._prefill_lens[data.req_id] = len(data.prefill_token_ids)
        req_ids, sampled = list(scheduled.num_scheduled_tokens), []
        for req_id, num_tokens in scheduled.num_scheduled_tokens.items():
            self._num_computed[req_id] += num_tokens
            position = self._num_computed[req_id]
            sampled.append([self._sample(req_id, position)] if position >= self._prefill_lens[req_id] else [])
        first = np.array([token_ids[0] if token_ids else 0 for token_ids in sampled], np.int32)
        logprobs = LogprobsLists(
            np.stack([first, first, first + 1], axis=1),
            np.tile(np.array([-0.5, -0.5, -1.0], np.float32), (len(req_ids), 1)),
            np.ones(len(req_ids), np.int32),
        )
        return ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: row for row, req_id in enumerate(req_ids)},
            sampled_token_ids=sampled,
            logprobs=logprobs,
        )
