"""vLLM arguments that a configuration can't set with ``engines.*.vllm``, each with the reason.

They either have a setting of their own, or would change what an engine's output means to the rollouts. vLLM itself
checks that the other arguments exist and have the right type (``rollout_server/engines/vllm_args.py``).
"""

from collections.abc import Mapping

_SETTINGS = {
    "attention_backend": "engines.*.attention_backend",
    "dtype": "engines.*.dtype",
    "enable_expert_parallel": "engines.*.enable_expert_parallel",
    "enforce_eager": "engines.*.enforce_eager",
    "gpu_memory_utilization": "engines.*.gpu_memory_utilization",
    "kv_cache_dtype": "engines.*.kv_cache_dtype",
    "kv_cache_memory_bytes": "engines.*.kv_cache_gib",
    "max_logprobs": "engines.top_logprobs",
    "max_model_len": "engines.*.max_model_len",
    "max_num_batched_tokens": "engines.*.max_num_batched_tokens",
    "max_num_seqs": "engines.*.max_num_seqs",
    "model": "models.*",
    "pipeline_parallel_size": "engines.*.pipeline_parallel_size",
    "quantization": "engines.*.quantization",
    "tensor_parallel_size": "engines.*.tensor_parallel_size",
    "trust_remote_code": "engines.trust_remote_code",
    "weight_transfer_config": "sync.backend",
    **dict.fromkeys(
        (
            "data_parallel_address",
            "data_parallel_backend",
            "data_parallel_external_lb",
            "data_parallel_hybrid_lb",
            "data_parallel_multi_port_external_lb",
            "data_parallel_rank",
            "data_parallel_rpc_port",
            "data_parallel_size",
            "data_parallel_size_local",
            "data_parallel_start_rank",
        ),
        "engines.*.num_replicas",
    ),
}

_ONE_MODEL = "engine, learner and tokenizer must load the same files; put them in a folder and set models.* to it"
_ONE_PLACE = "an engine runs on its actor's machine and GPUs"
_SPECULATION = "a stream that pauses for the decision must end at an exact token"
_REASONS = {
    "code_revision": _ONE_MODEL,
    "device_ids": _ONE_PLACE,
    "disable_log_stats": "the run writes its own metrics",
    "distributed_executor_backend": _ONE_PLACE,
    "enable_chunked_prefill": "on CPUs a seeded request with a chunked prefill crashes the engine",
    "enable_prefix_caching": "scoring needs the cached prefix",
    "hf_config_path": _ONE_MODEL,
    "kv_sharing_fast_prefill": "it returns wrong log-probs for the prompt",
    "load_format": "weights are read from safetensors files only; pickled ones can run code",
    "logprobs_mode": "divergence and loss are defined on raw log-probs, at temperature 1 and before top-p",
    "master_addr": _ONE_PLACE,
    "master_port": _ONE_PLACE,
    "model_weights": _ONE_MODEL,
    "nnodes": _ONE_PLACE,
    "node_rank": _ONE_PLACE,
    "revision": _ONE_MODEL,
    "scheduling_policy": "paused streams must keep their KV cache blocks",
    "skip_tokenizer_init": "requests and outputs are token ids already, and both tokenizers are compared at the start",
    "spec_method": _SPECULATION,
    "spec_model": _SPECULATION,
    "spec_tokens": _SPECULATION,
    "speculative_config": _SPECULATION,
    "stream_interval": "each request sets its number of tokens per output",
    "tokenizer": _ONE_MODEL,
    "tokenizer_revision": _ONE_MODEL,
}

_OLD_CACHE = "after a weight sync it would still hold states from the old weights"
_STUDENTS_REASONS = {
    "kv_offloading_backend": _OLD_CACHE,
    "kv_offloading_size": _OLD_CACHE,
    "kv_transfer_config": _OLD_CACHE,
    "quantization_config": "the student engine must use the trained weights unchanged; quantize the teacher",
}


def refusal(options: Mapping[str, object]) -> str | None:
    """Why the first of these arguments that can't be set in ``vllm`` is refused; None if all are allowed."""
    for name in options:
        if name in _SETTINGS:
            return f"vllm.{name} has a setting of its own: use {_SETTINGS[name]}"
        if name in _REASONS:
            return f"vllm.{name} can't be set: {_REASONS[name]}"
    return None


def students_refusal(options: Mapping[str, object]) -> str | None:
    """The same check for arguments that only the student can't have."""
    for name in options:
        if name in _STUDENTS_REASONS:
            return f"vllm.{name} can't be set for the student: {_STUDENTS_REASONS[name]}"
    return None
