"""GPU memory of a run's parts, by arithmetic. Pure: does not use Ray or vLLM, and allocates nothing.

Each function gives the source of its formula. Values marked as estimates are round numbers or rules of thumb that
depend on driver, kernels or allocator; none has been compared with a GPU yet. ``tests/deploy/cluster/test_memory.py``
compares the learner's formula with the bytes that torch allocates on a CPU.
"""

import math
from dataclasses import dataclass

from common.config import EngineSettings, Trainer
from common.weights import SyncBackend, nccl_buffer_bytes
from deploy.cluster.model_shape import ModelShape
from rollout_server.engines.vllm_memory import GIB, Scoring

CONTEXT_GIB = 0.75
"""Estimate: a process's GPU memory before its first tensor (CUDA context, loaded kernels, cuBLAS), 0.5 to 1 GiB."""
GRAPHS_GIB = 0.75
"""Estimate: vLLM's captured CUDA graphs."""
COMMUNICATOR_GIB = 0.5
"""Estimate: the buffers of an NCCL group."""
CACHE_BLOCK_TOKENS = 16
"""vLLM's block size on GPUs. A sequence takes whole blocks."""

_FLOAT32, _HALF = 4, 2
_SAMPLER_BYTES = 12  # estimate: per logit, in the model's dtype and in float32, and a copy for sorting
# Bits per weight by vLLM's quantization name, used if the model's config does not give them.
_BITS = {
    "fp8": 8, "fbgemm_fp8": 8, "ptpc_fp8": 8, "modelopt": 8, "modelopt_mxfp8": 8, "mxfp8": 8, "experts_int8": 8,
    "awq": 4, "awq_marlin": 4, "gptq": 4, "gptq_marlin": 4, "bitsandbytes": 4, "modelopt_fp4": 4, "mxfp4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One component of a process's memory, on each of its GPUs."""

    name: str
    gib: float
    is_estimate: bool = False


def total_gib(parts: tuple[Part, ...]) -> float:
    return sum(part.gib for part in parts)


# -------------------------------------------------------------------------------------------------------------- engines


def weight_bytes(shape: ModelShape, settings: EngineSettings) -> float:
    """Weights of the whole model: quantized matrices by their bits, everything else in the engine's dtype.

    A group of quantized weights has a scale of 2 bytes and a zero point of half a byte (AutoAWQ's and GPTQ's formats).
    An unknown method counts as not quantized.
    """
    plain = dtype_bytes(settings)
    matrix = plain if (quantized := _quantized_bytes(shape, settings)) is None else quantized
    return shape.num_matrix_parameters * matrix + (shape.num_parameters - shape.num_matrix_parameters) * plain


def dtype_bytes(settings: EngineSettings) -> int:
    """Bytes per number of an engine on GPUs. auto means bfloat16 or float16 there."""
    return _FLOAT32 if settings.dtype == "float32" else _HALF


def _quantized_bytes(shape: ModelShape, settings: EngineSettings) -> float | None:
    stored = shape.quantization or {}
    method = settings.quantization or stored.get("quant_method")
    if method is None:
        return None
    bits = stored.get("bits") or stored.get("weight_bits") or _grouped_bits(stored) or _BITS.get(method)
    if bits is None:
        return None
    group = stored.get("group_size") or stored.get("q_group_size")
    return float(bits) / 8 + (2.5 / group if isinstance(group, int) and group > 0 else 0.0)


def _grouped_bits(stored: object) -> int | None:
    """compressed-tensors stores the bits with each group of layers."""
    groups = stored.get("config_groups") if isinstance(stored, dict) else None
    bits = [(group.get("weights") or {}).get("num_bits") for group in (groups or {}).values()]
    known = [each for each in bits if each]
    return max(known) if known else None


def cache_bytes_per_token(shape: ModelShape, settings: EngineSettings) -> int:
    """Keys and values of all layers on one GPU (vLLM's ``FullAttentionSpec``, ``MLAAttentionSpec``).

    Tensor parallelism divides the KV heads, down to one per GPU; pipeline parallelism divides the layers. Layers with
    sliding-window attention are counted as full attention, which is an upper bound.
    """
    number_bytes = 1 if settings.kv_cache_dtype.startswith(("fp8", "int8")) else dtype_bytes(settings)
    if settings.kv_cache_dtype in ("float32", "float"):
        number_bytes = _FLOAT32
    width = shape.cache_width
    if shape.splits_cache:
        width = width // shape.num_kv_heads * math.ceil(shape.num_kv_heads / settings.tensor_parallel_size)
    return width * math.ceil(shape.num_layers / settings.pipeline_parallel_size) * number_bytes


def cache_gib_per_sequence(shape: ModelShape, settings: EngineSettings, *, max_model_len: int) -> float:
    """A sequence that fills the context. vLLM does not start an engine whose cache can't hold one."""
    blocks = math.ceil(max_model_len / CACHE_BLOCK_TOKENS)
    return blocks * CACHE_BLOCK_TOKENS * cache_bytes_per_token(shape, settings) / GIB


def engine_parts(
    shape: ModelShape, settings: EngineSettings, *, num_batched_tokens: int, scoring: Scoring, joins_nccl: bool
) -> tuple[Part, ...]:
    """Memory of one engine on each of its GPUs, without the cache. ``joins_nccl``: it is in the weight-transfer group.

    Activations are an estimate: the larger of a layer's peak in vLLM's largest step (four hidden vectors, three inner
    ones) and the sampler's rows.
    """
    tensor, stages = settings.tensor_parallel_size, settings.pipeline_parallel_size
    number = dtype_bytes(settings)
    layer_bytes = num_batched_tokens * (4 * shape.hidden_size + 3 * shape.inner_size / tensor) * number
    rows_bytes = settings.max_num_seqs * shape.vocab_size * _SAMPLER_BYTES
    nccl_gib = COMMUNICATOR_GIB if tensor * stages > 1 else 0.0
    if joins_nccl:
        nccl_gib += _transfer_gib(shape, number)
    return tuple(
        part
        for part in (
            Part(name="weights", gib=weight_bytes(shape, settings) / (tensor * stages) / GIB),
            Part(name="activations", gib=max(layer_bytes, rows_bytes) / GIB, is_estimate=True),
            Part(name="prompt log-probs", gib=scoring.bytes_for(num_batched_tokens) / GIB),
            Part(name="CUDA graphs", gib=0.0 if settings.enforce_eager else GRAPHS_GIB, is_estimate=True),
            Part(name="NCCL", gib=nccl_gib, is_estimate=True),
            Part(name="CUDA context", gib=CONTEXT_GIB, is_estimate=True),
        )
        if part.gib
    )


def _transfer_gib(shape: ModelShape, number_bytes: int) -> float:
    """NCCL group and buffers of the weight transfer, on each side. The largest tensor is the output layer."""
    return COMMUNICATOR_GIB + nccl_buffer_bytes(shape.vocab_size * shape.hidden_size * number_bytes) / GIB


# -------------------------------------------------------------------------------------------------------------- learner


def learner_parts(
    shape: ModelShape, trainer: Trainer, *, sync_backend: SyncBackend, engine_bytes: int
) -> tuple[Part, ...]:
    """Memory of one learner rank at the peak of a step. ``engine_bytes``: bytes per weight in the engine.

    The peak is in the loss, or in the backward pass through a layer. Sending the weights comes after both and counts
    only if it needs more.
    """
    nccl_gib = COMMUNICATOR_GIB if trainer.num_ranks > 1 else 0.0
    if sync_backend == "nccl":
        nccl_gib += _transfer_gib(shape, engine_bytes)
    kept, one_layer = _activation_bytes(shape, trainer)
    loss = _loss_bytes(shape, trainer)
    ends = 0 if trainer.lora is not None else 2 * _FLOAT32 * shape.vocab_size * shape.hidden_size
    backward = one_layer + ends  # the embedding's and output layer's gradients, before they are accumulated
    passing = max(loss, backward, _sent_bytes(shape, sync_backend, engine_bytes) - kept)
    return tuple(
        part
        for part in (
            Part(name="weights, gradients, AdamW", gib=_state_bytes(shape, trainer) / GIB),
            Part(name="bfloat16 weights", gib=_copies_bytes(shape, trainer) / GIB),
            Part(name="gathered layers", gib=_gathered_bytes(shape, trainer) / GIB),
            Part(name="activations", gib=kept / GIB, is_estimate=True),
            Part(name="loss or backward pass", gib=passing / GIB, is_estimate=True),
            Part(name="NCCL", gib=nccl_gib, is_estimate=True),
            Part(name="CUDA context", gib=CONTEXT_GIB, is_estimate=True),
        )
        if part.gib
    )


def adapter_parameters(shape: ModelShape, trainer: Trainer) -> int:
    """Number of adapter parameters: rank x (inputs + outputs) of each adapted layer (arXiv 2106.09685, section 4.1)."""
    assert trainer.lora is not None
    targets = trainer.lora.target_modules
    sides = [
        size
        for name, size in shape.linear_sides.items()
        if isinstance(targets, str) or name in {target.rpartition(".")[2] for target in targets}
    ]
    return trainer.lora.rank * sum(sides)


def _state_bytes(shape: ModelShape, trainer: Trainer) -> float:
    """Float32 weights, gradients and AdamW's two moments: 16 bytes per parameter, divided by the ranks. Frozen
    parameters have only the weight (torch.optim.AdamW; Learner).
    """
    if trainer.lora is not None:
        return _FLOAT32 * shape.num_parameters + 4 * _FLOAT32 * adapter_parameters(shape, trainer)
    return 4 * _FLOAT32 * shape.num_parameters / trainer.num_ranks


def _copies_bytes(shape: ModelShape, trainer: Trainer) -> float:
    """Autocast casts each matrix once and keeps the copy until it exits, even for layers that are sharded over ranks
    (ATen/autocast_mode.cpp, ``cached_cast``). A frozen matrix's copy is kept only for the gradient.
    """
    if trainer.dtype != "bfloat16":
        return 0.0
    layers = shape.num_layers if trainer.lora is not None and trainer.activation_checkpointing else 1
    return _HALF * shape.num_matrix_parameters / layers


def _gathered_bytes(shape: ModelShape, trainer: Trainer) -> float:
    """With several ranks, a layer is gathered while it computes, the next one is prefetched, and the gradient is whole
    before it is reduced. The same holds for embedding and output layer (FSDP2, ``reshard_after_forward``;
    ``sharding.shard``).
    """
    if trainer.num_ranks == 1:
        return 0.0
    layer = shape.num_layer_parameters / shape.num_layers
    return _FLOAT32 * (3 * layer + shape.num_embedding_parameters + shape.vocab_size * shape.hidden_size)


def _activation_bytes(shape: ModelShape, trainer: Trainer) -> tuple[float, float]:
    """Bytes that autograd keeps for ``tokens_per_micro_batch`` tokens until the loss (everything in each layer, or only
    its input with checkpointing), and bytes for the backward pass through one layer on top (the layer's activations
    again, and gradients of the same size).

    The coefficients are those of a Llama decoder layer with sdpa attention. Its residual stream is float32 even under
    autocast, because the embedding is.
    """
    half = trainer.dtype == "bfloat16"
    hidden, inner = shape.hidden_size, shape.inner_size
    heads = (shape.num_heads + shape.num_kv_heads) * shape.head_size  # queries with their output, keys and values
    layer = (26 * hidden + 8 * inner + 4 * heads) if half else (24 * hidden + 16 * inner + 8 * heads)
    layer += 4 * shape.num_heads
    tokens = trainer.tokens_per_micro_batch
    if trainer.activation_checkpointing:
        return tokens * shape.num_layers * _FLOAT32 * hidden, 2.0 * tokens * layer
    return float(tokens * shape.num_layers * layer), float(tokens * layer)


def _loss_bytes(shape: ModelShape, trainer: Trainer) -> float:
    """The output layer's gradient, if it is trained; with bfloat16 also the layer and one chunk's part of its gradient;
    one chunk's logits in float32, and the copy that becomes their gradient (``trainer/loss.py``).
    """
    number = _HALF if trainer.dtype == "bfloat16" else 0
    gradient = 0 if trainer.lora is not None else _FLOAT32 + number
    layer = shape.vocab_size * shape.hidden_size * (number + gradient)
    return layer + trainer.positions_per_chunk * shape.vocab_size * 2 * _FLOAT32


def _sent_bytes(shape: ModelShape, sync_backend: SyncBackend, engine_bytes: int) -> float:
    """IPC shares a copy of all weights with the engine. Host memory and NCCL cast one tensor at a time."""
    if sync_backend == "ipc":
        return float(engine_bytes * sent_parameters(shape))
    return float(engine_bytes * shape.vocab_size * shape.hidden_size)


# ---------------------------------------------------------------------------------------------------------- host memory


def sent_parameters(shape: ModelShape) -> int:
    """Number of parameters in a weight sync. A tied output layer is sent under its own name too."""
    return shape.num_parameters + (shape.vocab_size * shape.hidden_size if shape.is_tied else 0)


def shared_memory_gib(shape: ModelShape, *, engine_bytes: int) -> float:
    """Space in /dev/shm for a weight sync through host memory: two versions of the weights, in the engine's dtype."""
    return 2 * sent_parameters(shape) * engine_bytes / GIB
