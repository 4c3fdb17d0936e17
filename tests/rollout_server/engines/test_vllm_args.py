"""What engines are started with, for machines that need not be here: arguments are built, nothing is started."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from common.config import EngineSettings
from common.config.vllm_options import _REASONS, _SETTINGS
from common.errors import UserError
from rollout_server.engines.protocol import EngineSpec
from rollout_server.engines.vllm_args import Hardware, engine_args, engine_config, engine_dtype, engine_environment
from rollout_server.engines.vllm_memory import GIB
from rollout_server.engines.vllm_plugin.weight_transfer import PLAIN_IPC

TEACHER = Path(__file__).parents[3] / "deploy" / "demo" / "models" / "teacher"
H100 = Hardware(dtypes=("bfloat16", "float16", "float32"), gpu_bytes=int(79.6 * GIB))
T4 = Hardware(dtypes=("float16", "float32"), gpu_bytes=int(14.7 * GIB))
OLD_PROCESSOR = Hardware(dtypes=("float32", "bfloat16", "float16"), scores_in_pieces=False)


def spec(**settings) -> EngineSpec:
    return EngineSpec(
        name="teacher",
        model=str(TEACHER),
        settings=EngineSettings.model_validate(settings),
        top_logprobs=16,
    )


def changed(args: AsyncEngineArgs) -> dict[str, object]:
    """The arguments that are not vLLM's defaults."""
    default = AsyncEngineArgs()
    names = [field.name for field in fields(AsyncEngineArgs)]
    return {name: getattr(args, name) for name in names if getattr(args, name) != getattr(default, name)}


@pytest.mark.parametrize("hardware", [H100, T4, OLD_PROCESSOR])
def test_whatever_we_set_a_configuration_cannot_set_through_vllm(hardware: Hardware) -> None:
    everything = spec(
        tensor_parallel_size=2,
        pipeline_parallel_size=2 if hardware.gpu_bytes else 1,
        enable_expert_parallel=True,
        quantization="fp8",
        kv_cache_dtype="fp8",
        attention_backend="FLASHINFER",
        max_model_len=100,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        kv_cache_gib=2.0,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
    )
    args = changed(engine_args(replace(everything, weight_transfer_backend="host_memory"), hardware))
    # A setting of theirs that has a default of ours; and what the quantization itself brings along.
    assert set(args) - {"block_size", "quantization_config"} <= {*_SETTINGS, *_REASONS}


def test_weights_over_cuda_ipc_reach_vllm_through_our_engine_that_takes_handles_as_plain_values() -> None:
    args = engine_args(replace(spec(), weight_transfer_backend="ipc"), H100)
    assert args.weight_transfer_config is not None
    assert args.weight_transfer_config.backend == PLAIN_IPC


def test_every_setting_reaches_vllm() -> None:
    args = engine_args(
        spec(
            dtype="float16",
            quantization="fp8",
            kv_cache_dtype="fp8",
            attention_backend="FLASHINFER",
            tensor_parallel_size=4,
            pipeline_parallel_size=2,
            enable_expert_parallel=True,
            max_num_batched_tokens=4096,
            max_num_seqs=32,
            max_model_len=100,
            kv_cache_gib=1.5,
            vllm={"block_size": 32, "seed": 7},
        ),
        H100,
    )
    assert (args.dtype, args.quantization, args.kv_cache_dtype) == ("float16", "fp8", "fp8")
    assert (args.tensor_parallel_size, args.pipeline_parallel_size, args.enable_expert_parallel) == (4, 2, True)
    assert (args.attention_backend, args.distributed_executor_backend) == ("FLASHINFER", "mp")
    assert (args.max_num_batched_tokens, args.max_num_seqs, args.max_model_len) == (4096, 32, 100)
    assert args.kv_cache_memory_bytes == 1.5 * GIB
    assert (args.block_size, args.seed) == (32, 7)


@pytest.mark.parametrize("parallel", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_an_engine_on_several_gpus_keeps_to_its_actors(parallel: dict[str, int]) -> None:
    assert engine_args(spec(**parallel), H100).distributed_executor_backend == "mp"
    assert engine_args(spec(), H100).distributed_executor_backend is None


def test_weights_come_from_safetensors_files_and_log_probs_are_raw_whatever_the_quantization() -> None:
    for settings in ({}, {"quantization": "fp8"}):
        args = engine_args(spec(**settings), H100)
        assert (args.load_format, args.logprobs_mode, args.max_logprobs) == ("safetensors", "raw_logprobs", -1)
        assert args.enable_prefix_caching
        assert args.scheduling_policy == "priority"


def test_vllm_gets_the_engines_share_less_what_scoring_takes() -> None:
    """Demo: 32 ids, so that the k + 1 entries of each position are most of it."""
    rows = 2 * 16384 * 17 * 12
    logits = 1024 * 32 * 2 * 3
    for settings, share in (({}, 0.9), ({"gpu_memory_utilization": 0.4}, 0.4), ({"gpu_memory_gib": 20}, 20 / 79.6)):
        args = engine_args(spec(**settings), H100)
        assert args.max_num_batched_tokens == 16384
        left = share - (rows + logits) / (79.6 * GIB)
        assert args.gpu_memory_utilization == pytest.approx(left, abs=1e-9)


def test_steps_of_a_gpu_are_longer_than_vllms_own() -> None:
    assert engine_args(spec(), T4).max_num_batched_tokens == 8192


def test_a_share_that_a_gpu_has_not_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^engines\.teacher\.gpu_memory_gib must be <= 14\.7, the GPU's memory, got 20$"
    ):
        engine_args(spec(gpu_memory_gib=20), T4)


def test_a_share_that_scoring_alone_would_fill_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_num_batched_tokens: .* engine's 0\.1 GiB, but 8000000 tokens need"):
        engine_args(spec(gpu_memory_gib=0.1, max_num_batched_tokens=8_000_000), H100)


@pytest.mark.parametrize(
    ("wanted", "hardware", "dtype"),
    [
        ("auto", H100, "bfloat16"),
        ("auto", T4, "auto"),
        ("auto", OLD_PROCESSOR, "float32"),
        ("float16", H100, "float16"),
        ("float32", T4, "float32"),
        ("bfloat16", OLD_PROCESSOR, "bfloat16"),
    ],
)
def test_the_dtype_is_the_machines_best_where_none_is_asked_for(wanted: str, hardware: Hardware, dtype: str) -> None:
    assert engine_dtype(wanted, hardware, key="k") == dtype


def test_a_dtype_the_gpu_has_not_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^engines\.teacher\.dtype must be one of float16, float32 on this machine, got bfloat16$"
    ):
        engine_args(spec(dtype="bfloat16"), T4)


def test_float32_on_a_gpu_is_float32_in_attention_too() -> None:
    assert engine_environment(spec(dtype="float32"), H100) == {
        "VLLM_PROCESS_NAME_PREFIX": "teacher",
        "TRITON_F32_DEFAULT": "ieee",
        "VLLM_FLOAT32_MATMUL_PRECISION": "highest",
    }
    assert engine_environment(spec(), H100) == {"VLLM_PROCESS_NAME_PREFIX": "teacher"}


def test_on_a_processor_an_engine_has_its_own_number_of_threads_and_one_process_of_vllm_s() -> None:
    assert engine_environment(spec(num_threads=3), OLD_PROCESSOR) == {
        "VLLM_PROCESS_NAME_PREFIX": "teacher",
        "OMP_NUM_THREADS": "3",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    assert engine_args(spec(), OLD_PROCESSOR).distributed_executor_backend == "uni"


def test_on_a_processor_each_rank_of_an_engine_has_a_process() -> None:
    two = spec(tensor_parallel_size=2)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in engine_environment(two, OLD_PROCESSOR)
    assert engine_args(two, OLD_PROCESSOR).distributed_executor_backend == "mp"


def test_on_a_processor_prompts_are_read_whole_into_a_cache_of_the_size_that_was_set() -> None:
    args = engine_args(spec(), OLD_PROCESSOR)
    assert (args.enable_chunked_prefill, args.max_num_batched_tokens, args.block_size) == (False, 8192, 16)
    assert args.kv_cache_memory_bytes == GIB
    args = engine_args(spec(kv_cache_gib=0.5, max_num_batched_tokens=512, vllm={"block_size": 64}), OLD_PROCESSOR)
    assert (args.max_num_batched_tokens, args.block_size) == (512, 64)
    assert args.kv_cache_memory_bytes == 0.5 * GIB


def test_pipeline_stages_are_for_gpus() -> None:
    with pytest.raises(UserError, match=r"^engines\.teacher\.pipeline_parallel_size must be 1 on CPUs, got 2$"):
        engine_args(spec(pipeline_parallel_size=2), OLD_PROCESSOR)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization": "fp9"}, "Unknown quantization method: fp9"),
        ({"max_num_batched_tokens": 16}, "max_num_batched_tokens"),
        ({"attention_backend": "FLASHY"}, "FLASHY"),
        ({"kv_cache_dtype": "fp9"}, "cache_dtype: Input should be 'auto', "),
    ],
)
def test_what_vllm_refuses_is_one_line_that_names_the_engine(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=r"^engines\.teacher: vLLM rejects these settings: ") as refused:
        engine_config(spec(**settings), Hardware.detect())
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
