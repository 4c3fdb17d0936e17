import pytest

from common.config import RunConfig
from deploy.cluster.placement import CPUS_PER_ACTOR, Seat, seat


def make_config(**parts) -> RunConfig:
    return RunConfig.model_validate(
        {"run_dir": "r", "models": {"student": "s", "teacher": "t"}, "data": {"path": "p"}, **parts}
    )


def test_on_gpus_every_engine_has_its_own_and_so_has_the_learner() -> None:
    engines = {"student": {"tensor_parallel_size": 2}, "teacher": {"tensor_parallel_size": 4}}
    plan = seat(make_config(engines=engines), use_gpus=True)
    assert [bundle.get("GPU", 0) for bundle in plan.bundles] == [2, 4, 0, 1]
    assert (plan.students, plan.teachers) == ([Seat(bundle=0, num_gpus=2)], [Seat(bundle=1, num_gpus=4)])
    assert (plan.rollouts, plan.learner) == (Seat(bundle=2), [Seat(bundle=3, num_gpus=1)])


def test_pipeline_stages_have_gpus_of_their_own_beside_those_of_a_stage() -> None:
    engines = {"teacher": {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}}
    plan = seat(make_config(engines=engines), use_gpus=True)
    assert [bundle.get("GPU", 0) for bundle in plan.bundles] == [1, 6, 0, 1]
    assert plan.teachers == [Seat(bundle=1, num_gpus=6)]


def test_each_replica_has_a_bundle_of_its_own() -> None:
    engines = {"student": {"num_replicas": 3}, "teacher": {"num_replicas": 2, "tensor_parallel_size": 2}}
    plan = seat(make_config(engines=engines), use_gpus=True)
    assert [bundle.get("GPU", 0) for bundle in plan.bundles] == [1, 1, 1, 2, 2, 0, 1]
    assert [place.bundle for place in plan.students + plan.teachers] == [0, 1, 2, 3, 4]


def test_each_rank_of_the_learner_has_a_gpu_of_its_own() -> None:
    plan = seat(make_config(trainer={"num_ranks": 3}), use_gpus=True)
    assert [bundle.get("GPU", 0) for bundle in plan.bundles] == [1, 1, 0, 1, 1, 1]
    assert plan.learner == [Seat(bundle=bundle, num_gpus=1) for bundle in (3, 4, 5)]


def test_several_ranks_do_not_fit_on_the_students_gpu() -> None:
    with pytest.raises(
        ValueError, match=r"trainer\.num_ranks must be 1 where placement\.learner is student_gpu, got 2"
    ):
        make_config(trainer={"num_ranks": 2}, placement={"learner": "student_gpu"})


def test_a_learner_on_the_students_gpu_halves_it_and_a_run_fits_on_two() -> None:
    plan = seat(make_config(placement={"learner": "student_gpu"}), use_gpus=True)
    assert sum(bundle.get("GPU", 0) for bundle in plan.bundles) == 2
    assert plan.learner == plan.students == [Seat(bundle=0, num_gpus=0.5)]
    assert plan.bundles[0]["CPU"] == 2 * CPUS_PER_ACTOR


@pytest.mark.parametrize("learner", ["own_gpu", "student_gpu"])
def test_without_gpus_a_run_fits_on_two_cores(learner) -> None:
    plan = seat(make_config(placement={"learner": learner}), use_gpus=False)
    assert not any("GPU" in bundle for bundle in plan.bundles)
    assert sum(bundle["CPU"] for bundle in plan.bundles) <= 2
    assert [place.num_gpus for place in plan.learner] == [0]
