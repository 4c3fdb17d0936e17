"""Engines that are set up otherwise than most: quantized weights, an argument passed through, two pipeline stages."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from vllm.v1.engine.async_llm import AsyncLLM

from common.sequence import Ids
from common.weights import WeightUpdate
from rollout_server.engines.protocol import EngineSpec, ScoreRequest
from rollout_server.engines.selftest import check_engine
from rollout_server.engines.vllm import VLLMEngine
from rollout_server.engines.vllm_args import Hardware, engine_args
from rollout_server.engines.vllm_plugin.weight_transfer import apply_update, init_transfer
from trainer.weight_files import write_safetensors
from trainer.weight_sender import LearnerWeights

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow, pytest.mark.timeout(300)]

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def a_text(*, seed: int, num_tokens: int = 80) -> Ids:
    return np.random.default_rng(seed).integers(4, 19, num_tokens).astype(np.int32)


def quantized(model: Path, folder: Path) -> Path:
    """A copy whose linear layers are int8, a scale for each output, in the format of compressed-tensors."""
    shutil.copytree(model, folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax(dim=1, keepdim=True) / 127
            tensors[f"{name}_scale"] = scale
            tensor = (tensor / scale).round().to(torch.int8)
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": _QUANTIZATION}))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def quantized_teacher(
    make_spec: Callable[[str], EngineSpec], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[VLLMEngine]:
    spec = make_spec("teacher")
    folder = quantized(Path(spec.model), tmp_path_factory.mktemp("int8") / "teacher")
    settings = spec.settings.model_copy(update={"max_num_seqs": 16, "vllm": {"block_size": 32}})
    engine = await asyncio.to_thread(VLLMEngine.start, replace(spec, model=str(folder), settings=settings))
    yield engine
    engine.shutdown()


async def test_an_argument_passed_through_is_in_effect(quantized_teacher) -> None:
    text = a_text(seed=1)
    await quantized_teacher.score(ScoreRequest(token_ids=text[:63], start=63))
    read = await quantized_teacher._read(ScoreRequest(token_ids=text, start=70), skip_cache=False)
    assert read.num_cached_tokens == 32  # of blocks of 16 tokens three would have been whole


async def test_a_quantized_teacher_is_loaded_by_what_its_config_says_and_passes_the_self_test(
    quantized_teacher, models, true_rows
) -> None:
    """And what it says is near what the whole weights say, but not the same."""
    config = quantized_teacher._llm.vllm_config
    assert (config.model_config.quantization, config.load_config.load_format) == ("compressed-tensors", "safetensors")
    await check_engine(
        quantized_teacher, name="teacher", prefix=a_text(seed=2, num_tokens=15), top_logprobs=32, dtype="float32"
    )
    text = a_text(seed=3)
    rows = await quantized_teacher.score(ScoreRequest(token_ids=text, start=1))
    expected: npt.NDArray[np.float64] = np.take_along_axis(true_rows(models.teacher, text), rows.token_ids, axis=1)
    rms = float(np.sqrt(np.square(rows.logprobs - expected).mean()))
    print(f"int8 against float32: {rms:.3f} nats, root mean square")
    assert 0.01 < rms < 0.5


# -------------------------------------------------------------------------------------------------- pipeline stages


def changed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """With every weight moved."""
    other, noise = deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.0 + 0.1 * torch.randn(parameter.shape, generator=noise))
    return other


def norms_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights that no processor packs into another layout."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "norm" in name}


async def test_each_pipeline_stage_takes_its_own_layers_from_an_update_with_all(
    make_spec, models, tmp_path, monkeypatch
) -> None:
    """vLLM 0.32 loads stages on a processor, and fails at their first request: only the update can be seen here."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send a function of ours to the workers
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    args = engine_args(replace(make_spec("teacher"), weight_transfer_backend="host_memory"), Hardware.detect())
    args.pipeline_parallel_size, args.distributed_executor_backend = 2, "mp"
    llm = await asyncio.to_thread(AsyncLLM.from_engine_args, args)
    try:
        await init_transfer(llm, {"folder": str(tmp_path)})
        teacher = changed(models.teacher)
        write_safetensors(tmp_path / "1.safetensors", LearnerWeights(teacher, dtype=torch.float32))
        await apply_update(llm, WeightUpdate(version=1, transfer_info={"path": str(tmp_path / "1.safetensors")}))
        stages = await llm.collective_rpc("apply_model", args=(norms_of,))
        held = {name: weight for stage in stages for name, weight in stage.items()}
        assert [len(stage) for stage in stages] != [len(held)] * 2, "each holds a part"
        expected = norms_of(teacher)
        assert held.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(held[name], weight)
    finally:
        llm.shutdown()
