"""Layouts on a Ray that is told of two GPUs: who gets which, in which order they start, and what they are told."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.util.placement_group import remove_placement_group

from common.config import RunConfig
from common.config.source import read_config
from common.run_dir import RunDir
from deploy.cluster.actors import ActorClasses, Cluster, Pair, SpawnedLearner
from deploy.cluster.model_shape import read_shapes
from deploy.cluster.plan import Node, Plan, make_plan, processor_plan
from deploy.cluster.reservation import gpu_nodes, num_gpus, reserve
from deploy.preflight import prepare
from tests.support.faulty_runs import write_config
from tests.support.ray_heads import joined, started_ray
from tests.support.recorded_starts import FILE, RecordedEngineActor, RecordedLearnerActor, overlap, read_starts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RECORDED = ActorClasses(engine=RecordedEngineActor, learner=RecordedLearnerActor)
TWO = [Node(num_gpus=2, gpu_gib=24.0)]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray of this module's own; yields the file in which its actors say that they start."""
    file = tmp_path_factory.mktemp("starts") / "starts.jsonl"
    # As where a node's Ray was started with all GPUs visible: what actors inherit.
    inherited = {FILE: str(file), "CUDA_VISIBLE_DEVICES": "0,1"}
    with started_ray("--num-gpus 2", num_cpus=4) as address, joined(address, runtime_env={"env_vars": inherited}):
        yield file


@pytest.fixture
def config(tmp_path: Path, starts: Path) -> RunConfig:
    starts.write_text("")
    return read_config(write_config(tmp_path / "run")).config


def planned(config: RunConfig, layout: str) -> Plan:
    placement = config.placement.model_copy(update={"layout": layout})
    plan = make_plan(config.model_copy(update={"placement": placement}), read_shapes(config), TWO)
    assert plan.missing is None
    return plan


@asynccontextmanager
async def started(
    config: RunConfig, plan: Plan, folder: Path
) -> AsyncIterator[tuple[Cluster, Pair, SpawnedLearner, str | None]]:
    """All actors, and the GPUs that the controller's process sees."""
    group = await reserve(plan.placement, strategy="PACK", timeout_s=60.0)
    cluster = Cluster(config, plan, group, RECORDED, hides_gpus=True)
    try:
        pair, learner = await cluster.start(prepare(config), RunDir(folder), name="layouts")
        await cluster.connect_learner(learner, pair)
        yield cluster, pair, learner, await pair.controller.handle.__ray_call__.remote(_visible_gpus)
    finally:
        await cluster.stop()
        remove_placement_group(group)


def _visible_gpus(_: Any) -> str | None:
    import os

    return os.environ.get("CUDA_VISIBLE_DEVICES")


async def test_one_gpu_is_everyones_and_they_start_in_turn_also_again(config, starts, tmp_path) -> None:
    plan = planned(config, "one_gpu")
    async with started(config, plan, tmp_path) as (cluster, pair, learner, controllers_gpus):
        first = read_starts(starts)
        assert [start["name"] for start in first] == ["teacher", "student", "learner"]
        assert not overlap(first)
        assert len({start["gpus"] for start in first}) == 1
        assert first[0]["gpus"] in ("0", "1")
        assert controllers_gpus == ""
        for start in first[:2]:
            budget, settings = plan.budgets[start["name"]], start["settings"]
            assert settings["kv_cache_gib"] == budget.kv_cache_gib > 0
            assert settings["gpu_memory_gib"] == budget.gpu_memory_gib
            assert settings["max_num_batched_tokens"] == budget.max_num_batched_tokens
        assert (first[1]["backend"], first[2]["backend"], first[2]["device"]) == ("host_memory", "host_memory", "cuda")

        workers = cluster.workers(learner, pair)
        await workers.process_ids()
        await workers.recover_rollouts({"student engine", "teacher engine"})
        again = read_starts(starts)[3:]
        assert sorted(start["name"] for start in again) == ["student", "teacher"]
        assert not overlap(again)
        assert {start["gpus"] for start in again} == {first[0]["gpus"]}


async def test_student_and_learner_share_a_gpu_in_turn_and_the_teacher_has_the_other(config, starts, tmp_path) -> None:
    plan = planned(config, "shared_student")
    async with started(config, plan, tmp_path):
        by_name = {start["name"]: start for start in read_starts(starts)}
    assert by_name["student"]["gpus"] == by_name["learner"]["gpus"] != by_name["teacher"]["gpus"]
    assert by_name["learner"]["began_s"] > by_name["student"]["ended_s"]
    assert by_name["student"]["settings"]["kv_cache_gib"] == plan.budgets["student"].kv_cache_gib
    assert by_name["teacher"]["settings"]["kv_cache_gib"] is None


async def test_a_run_on_processors_sees_no_gpu_of_its_machine(config, starts, tmp_path) -> None:
    plan = processor_plan(config, "on purpose")
    async with started(config, plan, tmp_path) as (*_, controllers_gpus):
        seen = {start["name"]: start["gpus"] for start in read_starts(starts)}
    assert seen == {"student": "", "teacher": "", "learner": ""}
    assert controllers_gpus == ""


def test_a_node_that_can_t_say_how_large_its_gpus_are_is_known_all_the_same(starts) -> None:
    assert num_gpus() == 2
    assert [(node.num_gpus, node.gpu_gib) for node in gpu_nodes()] == [(2, None)]
