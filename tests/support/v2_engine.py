"""Our engine on vLLM as it is on GPUs, on a processor: Model Runner V2, asynchronous scheduling, prompts in pieces."""

import os
from pathlib import Path

import pytest
from vllm.v1.engine.async_llm import AsyncLLM

from rollout_server.engines.protocol import EngineSpec
from rollout_server.engines.vllm import VLLMEngine
from rollout_server.engines.vllm_args import Hardware, engine_args

BLOCK = 16  # tokens, as on GPUs


def start_v2_engine(spec: EngineSpec, *, max_num_batched_tokens: int) -> VLLMEngine:
    """Must run inside a running event loop. Its arguments are those of a processor but for what differs."""
    args = engine_args(spec, Hardware.detect())
    args.enable_chunked_prefill = True
    args.max_num_batched_tokens = max_num_batched_tokens
    args.worker_cls = "tests.support.v2_worker.V2Worker"
    config = args.create_engine_config()
    config.scheduler_config.async_scheduling = True  # which vLLM switches off on processors
    config.__dict__["__post_init__"] = _leave_as_it_is
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")  # refused before, for lack of Triton
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)  # where the worker is
        llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    return VLLMEngine(llm, spec.top_logprobs)


def _leave_as_it_is() -> None:
    """vLLM's engine process would go over its configuration again, refuse V2 without Triton, and switch asynchronous
    scheduling off.
    """
