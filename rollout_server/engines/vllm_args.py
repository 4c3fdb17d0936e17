"""The arguments of a vLLM engine and the environment of its processes. Starts nothing.

Sets the arguments that the Engine protocol depends on (raw log-probs, enough of them, prefix caching) and those that
depend on the machine: dtype, tokens per step, GPU memory.
"""

from dataclasses import dataclass
from typing import Self

import torch
import vllm.envs
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from vllm.config import VllmConfig, WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from common.config import OWN_GPU_SHARE
from common.errors import UserError, one_line
from rollout_server.engines.protocol import EngineSpec
from rollout_server.engines.vllm_memory import GIB, Scoring, batched_tokens
from rollout_server.engines.vllm_options import checked_options
from rollout_server.engines.vllm_plugin.weight_transfer import engine_backend

_CPU_BLOCK_TOKENS = 16  # see ``cpu_attention``
_CPU_CACHE_GIB = 1.0
_CPU_BATCHED_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The properties of the machine that the arguments depend on."""

    dtypes: tuple[str, ...]  # supported, the preferred one first
    gpu_bytes: int | None = None  # memory of one GPU; None on CPUs
    scores_in_pieces: bool = True  # vLLM's Model Runner V2, its default on GPUs

    @classmethod
    def detect(cls) -> Self:
        """This process's machine, as vLLM sees it. Raises UserError if the vLLM build does not support it."""
        dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in current_platform.supported_dtypes)
        if current_platform.is_unspecified():
            raise UserError("the installed vLLM is built for GPUs and finds none on this machine")
        if current_platform.is_cpu():
            if not torch.cpu._is_avx512_bf16_supported():  # bfloat16 would be emulated and far slower
                dtypes = ("float32", *(dtype for dtype in dtypes if dtype != "float32"))
            return cls(dtypes=dtypes, scores_in_pieces=False)
        return cls(
            dtypes=dtypes,
            gpu_bytes=int(current_platform.get_device_total_memory()),
            scores_in_pieces=vllm.envs.VLLM_USE_V2_MODEL_RUNNER is not False,
        )


def engine_config(spec: EngineSpec, hardware: Hardware) -> VllmConfig:
    """vLLM's configuration of this engine. Raises a one-line UserError for settings that vLLM rejects."""
    try:
        return engine_args(spec, hardware).create_engine_config()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"engines.{spec.name}: vLLM rejects these settings: {_reason(error)}") from error


def engine_args(spec: EngineSpec, hardware: Hardware) -> AsyncEngineArgs:
    """The arguments of one engine. Raises UserError for settings that this machine does not support."""
    settings = spec.settings
    args = AsyncEngineArgs(
        **checked_options(settings.vllm, key=f"engines.{spec.name}.vllm"),
        model=spec.model,
        trust_remote_code=spec.trust_remote_code,
        load_format="safetensors",  # the default falls back to pickled weights
        dtype=engine_dtype(settings.dtype, hardware, key=f"engines.{spec.name}.dtype"),
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        enable_expert_parallel=settings.enable_expert_parallel,
        # vLLM's own processes on the actor's GPUs. By default vLLM uses Ray's placement group and requests more GPUs.
        distributed_executor_backend="mp" if settings.num_gpus > 1 else None,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        enforce_eager=settings.enforce_eager,
        attention_backend=settings.attention_backend,
        enable_prefix_caching=True,
        scheduling_policy="priority",  # sessions are never preempted: see ``vllm.py``
        max_logprobs=-1,  # no limit: k is our choice
        logprobs_mode="raw_logprobs",
        disable_log_stats=True,
    )
    if spec.weight_transfer_backend is not None:
        args.weight_transfer_config = WeightTransferConfig(backend=engine_backend(spec.weight_transfer_backend))
    if settings.kv_cache_gib is not None:
        args.kv_cache_memory_bytes = int(settings.kv_cache_gib * GIB)
    if hardware.gpu_bytes is None:
        _fit_processor(args, spec)
    else:
        _fit_gpu(args, spec, hardware, hardware.gpu_bytes)
    return args


def engine_environment(spec: EngineSpec, hardware: Hardware) -> dict[str, str]:
    """The environment variables that vLLM needs, here and in its processes.

    Process titles start with the role: ``student::EngineCore``, ``teacher::Worker``. Raises UserError for a dtype that
    this machine does not support.
    """
    dtype = engine_dtype(spec.settings.dtype, hardware, key=f"engines.{spec.name}.dtype")
    wanted = {"VLLM_PROCESS_NAME_PREFIX": spec.name}
    if hardware.gpu_bytes is None:
        wanted |= {"OMP_NUM_THREADS": str(spec.settings.num_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if spec.settings.num_gpus == 1:
            # vLLM's condition for the "uni" executor on CPUs. AsyncLLM has its engine process all the same.
            wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    elif dtype == "float32":
        # Triton, used for attention here, multiplies in TF32 by default; torch does so only on request.
        wanted |= {"TRITON_F32_DEFAULT": "ieee", "VLLM_FLOAT32_MATMUL_PRECISION": "highest"}
    return wanted


def engine_dtype(wanted: str, hardware: Hardware, *, key: str) -> str:
    """The engine's dtype, as a vLLM argument.

    For auto this is the machine's preferred dtype. If that is float16, it is vLLM's own "auto", which uses float32 for
    models that overflow in float16.
    """
    if wanted == "auto":
        best = hardware.dtypes[0]
        return best if best != "float16" else "auto"
    if wanted not in hardware.dtypes:
        raise UserError(f"{key} must be one of {', '.join(hardware.dtypes)} on this machine, got {wanted}")
    return wanted


def _fit_processor(args: AsyncEngineArgs, spec: EngineSpec) -> None:
    if spec.settings.pipeline_parallel_size > 1:  # vLLM 0.32 loads the model, but crashes at the first request
        raise UserError(
            f"engines.{spec.name}.pipeline_parallel_size must be 1 on CPUs, got {spec.settings.pipeline_parallel_size}"
        )
    if args.kv_cache_memory_bytes is None:
        args.kv_cache_memory_bytes = int(_CPU_CACHE_GIB * GIB)
    if args.block_size is None:
        args.block_size = _CPU_BLOCK_TOKENS
    if spec.settings.num_gpus == 1:  # the model runs in vLLM's engine process, as on one GPU
        args.distributed_executor_backend = "uni"
    # The CPU engine crashes on a seeded request with chunked prefill, so prompts are prefilled as a whole.
    args.enable_chunked_prefill = False
    longest = args.create_model_config().max_model_len
    args.max_num_batched_tokens = spec.settings.max_num_batched_tokens or max(_CPU_BATCHED_TOKENS, longest)


def _fit_gpu(args: AsyncEngineArgs, spec: EngineSpec, hardware: Hardware, gpu_bytes: int) -> None:
    """Set tokens per step and vLLM's share of GPU memory: the engine's share minus the memory for scoring."""
    model = args.create_model_config()
    vocabulary = model.get_vocab_size()
    scoring = Scoring(
        vocabulary=vocabulary,
        top_logprobs=min(spec.top_logprobs, vocabulary),
        dtype_bytes=model.dtype.itemsize,
        in_pieces=hardware.scores_in_pieces,
    )
    engine_bytes = _engine_bytes(spec, gpu_bytes)
    args.max_num_batched_tokens = batched_tokens(
        scoring,
        setting=spec.settings.max_num_batched_tokens,
        gpu_bytes=gpu_bytes,
        engine_bytes=engine_bytes,
        max_num_seqs=spec.settings.max_num_seqs,
    )
    left_bytes = engine_bytes - scoring.bytes_for(args.max_num_batched_tokens)
    if left_bytes <= 0:
        raise UserError(
            f"engines.{spec.name}.max_num_batched_tokens: scoring must fit into the engine's "
            f"{engine_bytes / GIB:.1f} GiB, but {args.max_num_batched_tokens} tokens need "
            f"{scoring.bytes_for(args.max_num_batched_tokens) / GIB:.1f} GiB"
        )
    args.gpu_memory_utilization = left_bytes / gpu_bytes


def _engine_bytes(spec: EngineSpec, gpu_bytes: int) -> int:
    """The engine's share of a GPU's memory."""
    if spec.settings.gpu_memory_gib is None:
        return int((spec.settings.gpu_memory_utilization or OWN_GPU_SHARE) * gpu_bytes)
    if spec.settings.gpu_memory_gib * GIB > gpu_bytes:
        raise UserError(
            f"engines.{spec.name}.gpu_memory_gib must be <= {gpu_bytes / GIB:.1f}, the GPU's memory, "
            f"got {spec.settings.gpu_memory_gib:g}"
        )
    return int(spec.settings.gpu_memory_gib * GIB)


def _reason(error: ValueError) -> str:
    """What is wrong, without the full configuration that pydantic prints."""
    return one_line("; ".join(map(_problem, error.errors())) if isinstance(error, ValidationError) else error)


def _problem(problem: ErrorDetails) -> str:
    text = problem["msg"].removeprefix("Value error, ")
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {text}, got {problem['input']!r}" if place else text
