"""A run's bundles and slots under each layout, and which settings go with which."""

import re

import pytest
from pydantic import ValidationError

from common.config import RunConfig
from deploy.cluster.placement import CPUS_PER_ACTOR, Slot, place_actors

LAYOUTS = ["one_gpu", "shared_student", "spread"]


def make_config(**parts) -> RunConfig:
    return RunConfig.model_validate(
        {"run_dir": "r", "models": {"student": "s", "teacher": "t"}, "data": {"path": "p"}, **parts}
    )


def gpus(plan) -> list[float]:
    return [bundle.get("GPU", 0) for bundle in plan.bundles]


def test_spread_gives_every_engine_its_own_gpus_and_so_the_learner() -> None:
    engines = {"student": {"tensor_parallel_size": 2}, "teacher": {"tensor_parallel_size": 4}}
    plan = place_actors(make_config(engines=engines), "spread")
    assert gpus(plan) == [2, 4, 0, 1]
    assert (plan.students, plan.teachers) == ([Slot(bundle=0, num_gpus=2)], [Slot(bundle=1, num_gpus=4)])
    assert (plan.rollouts, plan.learner) == (Slot(bundle=2), [Slot(bundle=3, num_gpus=1)])
    assert not plan.learner_shares_gpu


def test_pipeline_stages_have_gpus_of_their_own_beside_those_of_a_stage() -> None:
    engines = {"teacher": {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}}
    plan = place_actors(make_config(engines=engines), "spread")
    assert gpus(plan) == [1, 6, 0, 1]
    assert plan.teachers == [Slot(bundle=1, num_gpus=6)]


def test_each_replica_has_a_bundle_of_its_own() -> None:
    engines = {"student": {"num_replicas": 3}, "teacher": {"num_replicas": 2, "tensor_parallel_size": 2}}
    plan = place_actors(make_config(engines=engines), "spread")
    assert gpus(plan) == [1, 1, 1, 2, 2, 0, 1]
    assert [place.bundle for place in plan.students + plan.teachers] == [0, 1, 2, 3, 4]


def test_each_rank_of_the_learner_has_a_gpu_of_its_own() -> None:
    plan = place_actors(make_config(trainer={"num_ranks": 3}), "spread")
    assert gpus(plan) == [1, 1, 0, 1, 1, 1]
    assert plan.learner == [Slot(bundle=bundle, num_gpus=1) for bundle in (3, 4, 5)]


def test_student_and_learner_share_a_gpu_beside_the_teachers() -> None:
    teacher = {"teacher": {"num_replicas": 2, "tensor_parallel_size": 2}}
    plan = place_actors(make_config(engines=teacher), "shared_student")
    assert gpus(plan) == [1, 2, 2, 0]
    assert plan.learner == plan.students == [Slot(bundle=0, num_gpus=0.5)]
    assert plan.learner_shares_gpu
    assert plan.bundles[0]["CPU"] == 2 * CPUS_PER_ACTOR


def test_one_gpu_runs_everything() -> None:
    plan = place_actors(make_config(), "one_gpu")
    assert gpus(plan) == [1, 0]
    assert plan.teachers == plan.students == plan.learner
    assert sum(place.num_gpus for place in plan.teachers + plan.students + plan.learner) <= 1
    assert plan.bundles[0]["CPU"] == 3 * CPUS_PER_ACTOR


@pytest.mark.parametrize(("layout", "num_gpus"), [("one_gpu", 1), ("shared_student", 2), ("spread", 2)])
def test_an_evaluation_needs_no_gpu_for_a_learner(layout, num_gpus) -> None:
    plan = place_actors(make_config(), layout, with_learner=False)
    assert (plan.learner, plan.learner_shares_gpu, sum(gpus(plan))) == ([], False, num_gpus)


@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
def test_without_gpus_a_run_fits_on_two_cores(layout) -> None:
    plan = place_actors(make_config(placement={"layout": layout}), None)
    assert not any(gpus(plan))
    assert sum(bundle["CPU"] for bundle in plan.bundles) <= 2
    assert [place.num_gpus for place in plan.learner] == [0]


@pytest.mark.parametrize(
    ("layout", "parts", "key"),
    [
        ("one_gpu", {"trainer": {"num_ranks": 2}}, "trainer.num_ranks must be 1"),
        ("one_gpu", {"engines": {"teacher": {"num_replicas": 2}}}, "engines.teacher.num_replicas must be 1"),
        (
            "shared_student",
            {"engines": {"student": {"tensor_parallel_size": 2}}},
            "engines.student.tensor_parallel_size",
        ),
        ("shared_student", {"sync": {"backend": "nccl"}}, "sync.backend must not be nccl"),
        ("spread", {"sync": {"backend": "ipc"}}, "sync.backend must not be ipc"),
    ],
)
def test_settings_that_a_layout_can_t_have_are_refused(layout, parts, key) -> None:
    make_config(**parts)  # under auto another layout has them
    with pytest.raises(ValidationError, match=rf"{re.escape(key)}.* if placement\.layout is {layout}.*, got "):
        make_config(placement={"layout": layout}, **parts)
