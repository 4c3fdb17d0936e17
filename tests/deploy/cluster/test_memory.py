"""The arithmetic of a run's memory: by hand for engines, against torch's allocations for the learner."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common.config import EngineSettings, LoRA, Trainer
from common.sequence import MixedSequence
from common.weights import nccl_buffer_bytes
from deploy.cluster.memory import (
    COMMUNICATOR_GIB,
    CONTEXT_GIB,
    GIB,
    GRAPHS_GIB,
    adapter_parameters,
    cache_bytes_per_token,
    cache_gib_per_sequence,
    engine_parts,
    learner_parts,
    shared_memory_gib,
    total_gib,
    weight_bytes,
)
from deploy.cluster.model_shape import ModelShape, shape_of
from rollout_server.engines.vllm_memory import Scoring
from trainer.learner import Learner

DEMO_STUDENT = Path(__file__).parents[3] / "deploy" / "demo" / "models" / "student"
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)


@pytest.fixture(scope="module")
def llama() -> ModelShape:
    return shape_of(LLAMA_8B)


def quantized(**config: Any) -> ModelShape:
    return shape_of(LlamaConfig(**{**LLAMA_8B.to_dict(), "quantization_config": config}))


# -------------------------------------------------------------------------------------------------------------- engines


def test_weights_take_their_dtype(llama) -> None:
    assert weight_bytes(llama, EngineSettings()) == 2 * 8_030_261_248
    assert weight_bytes(llama, EngineSettings(dtype="float32")) == 4 * 8_030_261_248


@pytest.mark.parametrize(
    ("config", "setting", "bytes_per_weight"),
    [
        ({}, "fp8", 1.0),
        ({"quant_method": "fp8"}, None, 1.0),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, None, 0.5 + 2.5 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, None, 1.0 + 2.5 / 32),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, None, 1.0),
        ({"quant_method": "something new"}, None, 2.0),
    ],
)
def test_only_the_layers_matrices_are_quantized(config, setting, bytes_per_weight) -> None:
    shape = quantized(**config) if config else shape_of(LLAMA_8B)
    embeddings_and_norms = 2 * 128256 * 4096 + (2 * 32 + 1) * 4096
    assert shape.num_parameters - shape.num_matrix_parameters == embeddings_and_norms
    matrices = 8_030_261_248 - embeddings_and_norms
    expected = matrices * bytes_per_weight + embeddings_and_norms * 2
    assert weight_bytes(shape, EngineSettings(quantization=setting)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "bytes_per_token"),
    [
        ({}, 2 * 32 * 8 * 128 * 2),
        ({"kv_cache_dtype": "fp8"}, 2 * 32 * 8 * 128),
        ({"dtype": "float32"}, 2 * 32 * 8 * 128 * 4),
        ({"tensor_parallel_size": 2}, 2 * 32 * 4 * 128 * 2),
        ({"tensor_parallel_size": 16}, 2 * 32 * 1 * 128 * 2),
        ({"pipeline_parallel_size": 3}, 2 * 11 * 8 * 128 * 2),
    ],
)
def test_a_token_s_keys_and_values_by_heads_and_layers_of_one_gpu(llama, settings, bytes_per_token) -> None:
    assert cache_bytes_per_token(llama, EngineSettings(**settings)) == bytes_per_token


def test_latent_attention_keeps_one_vector_on_every_gpu() -> None:
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        num_hidden_layers=4, hidden_size=256, n_routed_experts=8, n_group=2, topk_group=1, vocab_size=1000
    )
    settings = EngineSettings(tensor_parallel_size=8)
    assert cache_bytes_per_token(shape_of(config), settings) == 4 * (512 + 64) * 2


def test_a_sequence_takes_whole_blocks(llama) -> None:
    per_token = cache_bytes_per_token(llama, EngineSettings())
    assert cache_gib_per_sequence(llama, EngineSettings(), max_model_len=1001) == 1008 * per_token / GIB


def test_an_engine_s_parts(llama) -> None:
    scoring = Scoring(vocabulary=128256, top_logprobs=64, dtype_bytes=2, in_pieces=True)
    settings = EngineSettings(max_num_seqs=64, tensor_parallel_size=2)
    parts = engine_parts(llama, settings, num_batched_tokens=8192, scoring=scoring, joins_nccl=True)
    gib = {part.name: part.gib for part in parts}
    assert gib["weights"] == 8_030_261_248 / GIB
    assert gib["activations"] == 8192 * (4 * 4096 + 3 * 14336 / 2) * 2 / GIB
    assert gib["prompt log-probs"] == scoring.bytes_for(8192) / GIB
    assert (gib["CUDA graphs"], gib["CUDA context"]) == (GRAPHS_GIB, CONTEXT_GIB)
    assert gib["NCCL"] == 2 * COMMUNICATOR_GIB + nccl_buffer_bytes(128256 * 4096 * 2) / GIB
    eager = engine_parts(
        llama, EngineSettings(enforce_eager=True), num_batched_tokens=8192, scoring=scoring, joins_nccl=False
    )
    assert not {"CUDA graphs", "NCCL"} & {part.name for part in eager}
    assert {part.name for part in parts if part.is_estimate} == {"activations", "CUDA graphs", "NCCL", "CUDA context"}


def test_a_sync_through_host_memory_needs_room_for_two_versions_the_tied_layer_twice(llama) -> None:
    assert shared_memory_gib(llama, engine_bytes=2) == 2 * 2 * 8_030_261_248 / GIB
    tied = shape_of(LlamaConfig(**{**LLAMA_8B.to_dict(), "tie_word_embeddings": True}))
    assert tied.num_parameters == llama.num_parameters - 128256 * 4096
    assert shared_memory_gib(tied, engine_bytes=2) == shared_memory_gib(llama, engine_bytes=2)


# -------------------------------------------------------------------------------------------------------------- learner


def test_adamw_takes_16_bytes_a_parameter_over_the_ranks_and_a_frozen_one_4(llama) -> None:
    def state(**settings: Any) -> float:
        trainer = Trainer(**settings)
        parts = learner_parts(llama, trainer, sync_backend="host_memory", engine_bytes=2)
        return next(part.gib for part in parts if part.name == "weights, gradients, AdamW") * GIB

    assert state() == 16 * 8_030_261_248
    assert state(num_ranks=4) == 4 * 8_030_261_248
    lora = Trainer(lora=LoRA(rank=8))
    q_and_o, k_and_v, mlp = 2 * (4096 + 4096), 2 * (4096 + 1024), 3 * (4096 + 14336)
    assert adapter_parameters(llama, lora) == 8 * 32 * (q_and_o + k_and_v + mlp)
    assert adapter_parameters(llama, Trainer(lora=LoRA(rank=8, target_modules=("q_proj",)))) == 8 * 32 * 8192
    assert state(lora=LoRA(rank=8)) == 4 * 8_030_261_248 + 16 * adapter_parameters(llama, lora)


def test_ranks_gather_layers_and_ipc_shows_a_copy_of_all_weights(llama) -> None:
    trainer = Trainer(dtype="bfloat16", activation_checkpointing=True)
    alone = learner_parts(llama, trainer, sync_backend="host_memory", engine_bytes=2)
    ranks = learner_parts(
        llama, trainer.model_copy(update={"num_ranks": 2}), sync_backend="host_memory", engine_bytes=2
    )
    assert {part.name for part in ranks} - {part.name for part in alone} == {"gathered layers", "NCCL"}

    small = Trainer(tokens_per_micro_batch=1024, positions_per_chunk=128, activation_checkpointing=True)
    ipc = {part.name: part.gib for part in learner_parts(llama, small, sync_backend="ipc", engine_bytes=2)}
    assert ipc["activations"] + ipc["loss or backward pass"] == pytest.approx(2 * 8_030_261_248 / GIB)


TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=48,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "activation_checkpointing": True},
        {"dtype": "bfloat16", "activation_checkpointing": True, "lora": LoRA(rank=4)},
    ],
    ids=["float32", "bfloat16", "checkpointing", "adapter"],
)
def test_a_step_s_peak_is_what_the_arithmetic_says(settings, tmp_path, make_sequence) -> None:
    """Against the bytes that torch allocates in a step of two micro-batches; what kernels hold inside is not seen."""
    trainer = Trainer(tokens_per_micro_batch=256, positions_per_chunk=32, num_threads=1, **settings)
    sequences = [make_sequence(prompt_id=f"p{seed}", num_tokens=28, switches=[], seed=seed) for seed in range(16)]
    peak = step_peak(tmp_path, trainer, sequences)
    parts = learner_parts(shape_of(TINY), trainer, sync_backend="host_memory", engine_bytes=2)
    expected = (total_gib(parts) - CONTEXT_GIB) * GIB
    assert peak <= expected <= 1.3 * peak


def step_peak(folder: Path, trainer: Trainer, sequences: list[MixedSequence]) -> int:
    """Bytes of the learner's second step at its peak: the first one makes the optimizer's state."""
    LlamaForCausalLM(TINY).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_STUDENT).save_pretrained(folder)
    learner = Learner(str(folder), trainer, seed=0)
    learner.step(sequences)
    live = LiveBytes()
    state = (tensor for each in learner.optimizer.state.values() for tensor in each.values())
    for tensor in (*learner.model.parameters(), *state):
        live.see(tensor)
    with live:
        learner.step(sequences)
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return result
