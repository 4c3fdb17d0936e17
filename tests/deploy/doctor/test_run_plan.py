"""Where the actors of the two configurations of this repository would sit, on machines that this one is not."""

from dataclasses import replace
from pathlib import Path

import pytest

from common.config.source import ResolvedConfig, read_config
from deploy.cluster.gpus import Gpu
from deploy.cluster.plan import Node as PlanNode
from deploy.doctor.facts import GIB, Facts, Node, PlanFacts, RayState, Wanted
from deploy.doctor.run_plan import nodes_of, plan_facts_of
from deploy.doctor.sources import sources_of
from tests.deploy.doctor.machines import CPU_PACKAGES, GPU_SERVER, H100, LAPTOP, T4

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "deploy/configs/demo.yaml"
QWEN = ROOT / "deploy/configs/qwen2.5-gsm8k.yaml"


def plan(file: Path, facts: Facts, monkeypatch: pytest.MonkeyPatch, *settings: str) -> PlanFacts:
    monkeypatch.chdir(ROOT)
    resolved: ResolvedConfig = read_config(file, settings)
    return plan_facts_of(resolved.config, file, facts)


def test_a_machine_is_one_node_with_the_gpus_that_torch_sees() -> None:
    assert nodes_of(LAPTOP) == []
    assert nodes_of(GPU_SERVER) == [PlanNode(num_gpus=2, gpu_gib=79.6)]
    hidden = replace(GPU_SERVER, torch_gpus=1, visible_devices="0")
    assert nodes_of(hidden) == [PlanNode(num_gpus=1, gpu_gib=79.6)]
    mixed = replace(GPU_SERVER, gpus=(H100, replace(T4, index=1)))
    assert nodes_of(mixed) == [PlanNode(num_gpus=2, gpu_gib=15.0)]


def test_a_cluster_s_nodes_count_and_this_machine_s_gpus_do_not() -> None:
    cluster = RayState(address="10.0.0.1:6379", nodes=(Node(num_gpus=8, gpu_gib=80.0), Node(num_gpus=0)))
    assert nodes_of(replace(GPU_SERVER, ray=cluster)) == [PlanNode(num_gpus=8, gpu_gib=80.0)]


def test_without_gpus_the_demo_runs_on_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(DEMO, LAPTOP, monkeypatch)
    assert found.summary.startswith("processors (no GPU found)")
    assert found.missing is None
    assert found.bundles == ()
    # 0.11 M parameters in float32, twice; up to four checkpoints of 16 bytes a parameter.
    assert 0 < found.shm_bytes < 2**21
    assert 0 < found.checkpoints_bytes < 2**24


def test_cpu_builds_leave_gpus_alone_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(DEMO, replace(GPU_SERVER, packages=CPU_PACKAGES), monkeypatch)
    assert found.summary.startswith("processors (2 GPUs found, but the installed torch and vLLM are CPU builds")


def test_two_large_gpus_hold_teacher_and_student_and_each_actor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(QWEN, GPU_SERVER, monkeypatch)
    assert found.missing is None
    assert found.summary.startswith("shared_student")
    names = [name for name in ("teacher engine", "student engine", "learner") if name in " ".join(found.bundles)]
    assert names == ["teacher engine", "student engine", "learner"]
    assert len(found.bundles) == 2
    assert all(line.startswith("1 GPU: ") and line.endswith(" of 79.6 GiB") for line in found.bundles)
    # 0.63 B parameters, the tied output layer included, in bfloat16, twice.
    assert found.shm_bytes == pytest.approx(4 * 0.63e9, rel=0.01)
    assert found.checkpoints_bytes == pytest.approx(4 * (12 * 0.494e9 + 4 * 0.63e9), rel=0.01)


def test_gpus_that_are_too_small_are_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Gpu(index=0, name="tiny", gib=4.0, compute_capability=(8, 6))
    found = plan(QWEN, replace(GPU_SERVER, gpus=(tiny,), torch_gpus=1), monkeypatch)
    assert found.missing is not None
    assert found.missing.startswith("placement.layout: no layout fits 1 GPU of 4.0 GiB")


def test_a_cuda_build_without_a_gpu_can_t_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(DEMO, replace(GPU_SERVER, gpus=(), torch_gpus=0), monkeypatch)
    assert found.missing is not None
    assert "vLLM's CUDA build can't run on CPUs" in found.missing


def test_models_at_the_hub_need_room_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    resolved = read_config(QWEN)
    wanted = Wanted(file=str(QWEN), sources=sources_of(resolved.config))
    found = plan_facts_of(resolved.config, QWEN, replace(GPU_SERVER, wanted=wanted))
    assert found.download_bytes == pytest.approx(2 * (0.494e9 + 3.086e9), rel=0.01)
    assert found.download_bytes < 10 * GIB


def test_a_model_that_can_t_be_read_is_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(DEMO, LAPTOP, monkeypatch, "models.student=./not-there")
    assert found.missing is not None
    assert found.missing.startswith("models.student: can't read the config of './not-there'")
