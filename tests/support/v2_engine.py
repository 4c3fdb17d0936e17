"""Our engine on vLLM as it is on GPUs, on a processor: Model Runner V2, asynchronous scheduling, prompts in pieces."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from rollout_server.engines.vllm import VLLMEngine

BLOCK = 16  # tokens, as on GPUs


def start_v2_engine(
    model: Path,
    *,
    top_logprobs: int,
    max_num_batched_tokens: int,
    kv_cache_bytes: int = 2**26,
    weight_transfer_backend: str | None = None,
) -> VLLMEngine:
    """Must run inside a running event loop."""
    args = AsyncEngineArgs(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=True,
        scheduling_policy="priority",
        enable_chunked_prefill=True,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=32,
        block_size=BLOCK,
        kv_cache_memory_bytes=kv_cache_bytes,
        max_logprobs=-1,
        logprobs_mode="raw_logprobs",
        disable_log_stats=True,
        worker_cls="tests.support.v2_worker.V2Worker",
    )
    if weight_transfer_backend is not None:
        args.weight_transfer_config = WeightTransferConfig(backend=weight_transfer_backend)
    config = args.create_engine_config()
    config.scheduler_config.async_scheduling = True  # which vLLM switches off on processors
    with _environment():
        llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    assert config.scheduler_config.async_scheduling
    return VLLMEngine(llm, top_logprobs)


@contextmanager
def _environment() -> Iterator[None]:
    """Of vLLM's own processes."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")  # refused before, for lack of Triton
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)  # where the worker is
        yield
