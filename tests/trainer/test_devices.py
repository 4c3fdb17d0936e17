"""Where the learner computes: the device the run gives it, and nothing of it elsewhere."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from common.config import Trainer
from common.errors import UserError
from trainer.actors import LearnerSpec, allocator_settings
from trainer.learner import Learner, driver_for, learner_device, make_optimizer

REPOSITORY = Path(__file__).parents[2]


def spec(**fields: Any) -> LearnerSpec:
    defaults = {"student": "s", "trainer": Trainer(), "device": "cuda", "sync_backend": "nccl", "seed": 0}
    return LearnerSpec(**{**defaults, "trust_remote_code": False, **fields})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_learner_whose_gpu_torch_does_not_see_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^placement\.use_gpus: the learner has a GPU, but torch .* or .* false$"
    ) as refused:
        learner_device("cuda")
    assert "\n" not in str(refused.value)


def test_the_driver_that_is_needed_is_named() -> None:
    assert driver_for("13.0") == "an NVIDIA driver 580 or newer, for CUDA 13.0"
    assert driver_for("14.1") == "an NVIDIA driver that supports CUDA 14.1"


def test_a_run_without_gpus_computes_on_the_cpu_whatever_torch_sees(
    make_model: Callable[..., PreTrainedModel], save_model: Callable[..., str]
) -> None:
    assert learner_device("cpu") == torch.device("cpu")
    learner = Learner(save_model(make_model()), Trainer(), seed=0, device=learner_device("cpu"))
    assert {parameter.device.type for parameter in learner.model.parameters()} == {"cpu"}


def test_adamw_is_one_kernel_on_a_gpu_and_torch_s_choice_elsewhere() -> None:
    with FakeTensorMode():
        on_gpu = nn.Module()
        on_gpu.weight = nn.Parameter(torch.empty(2, 2, device="cuda:0"))
        assert [group["fused"] for group in make_optimizer(on_gpu, Trainer()).param_groups] == [True]
    assert [group["fused"] for group in make_optimizer(nn.Linear(2, 2), Trainer()).param_groups] == [None, None]


def test_a_gpu_s_memory_grows_in_place_unless_it_is_shared_or_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert allocator_settings(spec()) == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_settings(spec(sync_backend="ipc")) == {}
    assert allocator_settings(spec(device="cpu")) == {}
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    assert allocator_settings(spec()) == {}


@pytest.fixture(scope="module")
def on_pretend_device(
    make_model: Callable[..., PreTrainedModel],
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """What became of each case."""
    student = tmp_path_factory.mktemp("pretend") / "student"
    make_model(seed=2).save_pretrained(student)
    make_tokenizer().save_pretrained(student)
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.pretend_device", str(student)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


def test_mixed_devices_are_noticed(on_pretend_device: dict[str, str]) -> None:
    """Or the tests below could not fail."""
    assert on_pretend_device["tensors of both"].startswith("MixedDevices: aten.add.Tensor of tensors on pretend:0, cpu")
    assert on_pretend_device["a batch left on the cpu"].startswith("MixedDevices")


@pytest.mark.parametrize("case", ["padded", "packed and recomputed", "adapter on cross-entropy", "bfloat16"])
def test_a_step_and_a_probe_mix_no_devices_and_are_those_of_the_cpu(
    on_pretend_device: dict[str, str], case: str
) -> None:
    assert on_pretend_device[case] == "as on the cpu"
