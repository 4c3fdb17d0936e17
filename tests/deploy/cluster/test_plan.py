"""Which layout a run gets for what a cluster has, what its engines may take, and how a plan that does not fit reads."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import Qwen2Config

from common.config import RunConfig
from common.errors import UserError
from deploy.cluster.model_shape import Shapes, read_shapes, shape_of
from deploy.cluster.plan import Node, Plan, check_fits, make_plan, processor_plan
from deploy.reporting.plan_table import show_plan

QWEN_05B = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN_3B = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
TRAINER = {"dtype": "bfloat16", "activation_checkpointing": True, "tokens_per_micro_batch": 8192}


def qwen(**sizes: int) -> Qwen2Config:
    return Qwen2Config(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, **sizes)


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return Shapes(student=shape_of(qwen(**QWEN_05B)), teacher=shape_of(qwen(**QWEN_3B)))


def make_config(**parts: Any) -> RunConfig:
    engines = {"student": {"max_model_len": 2048}, "teacher": {"max_model_len": 2048}}
    for role, settings in parts.pop("engines", {}).items():
        engines[role] |= settings
    return RunConfig.model_validate(
        {
            "run_dir": "r",
            "models": {"student": "s", "teacher": "t"},
            "data": {"path": "p"},
            "trainer": TRAINER | parts.pop("trainer", {}),
            "engines": engines,
            **parts,
        }
    )


def nodes(*gpus: tuple[int, float | None]) -> list[Node]:
    return [Node(num_gpus=number, gpu_gib=gib) for number, gib in gpus]


def test_parameters_are_counted_exactly(shapes) -> None:
    assert (shapes.student.num_parameters, shapes.teacher.num_parameters) == (494_032_768, 3_085_938_688)
    assert shapes.student.is_tied


# ----------------------------------------------------------------------------------------------------------------- auto


@pytest.mark.parametrize(
    ("cluster", "layout", "backend", "why"),
    [
        ([(1, 80.0)], "one_gpu", "host_memory", "1 GPU of 80.0 GiB; spread needs 3 GPUs; shared_student needs 2 GPUs"),
        ([(2, 24.0)], "shared_student", "host_memory", "2 GPUs of 24.0 GiB; spread needs 3 GPUs"),
        ([(8, 80.0)], "spread", "nccl", "8 GPUs of 80.0 GiB"),
        ([(1, 80.0), (1, 80.0)], "shared_student", "host_memory", "2 GPUs of 80.0 GiB on 2 nodes; spread needs 3 GPUs"),
        ([(2, 24.0), (2, 80.0)], "spread", "nccl", "4 GPUs of 24.0 to 80.0 GiB on 2 nodes"),
    ],
)
def test_auto_takes_the_layout_with_the_most_gpus_that_there_are(shapes, cluster, layout, backend, why) -> None:
    plan = make_plan(make_config(), shapes, nodes(*cluster))
    assert (plan.layout, plan.sync_backend, plan.why, plan.missing) == (layout, backend, why, None)
    check_fits(plan)


def test_auto_leaves_out_what_the_settings_can_t_have(shapes) -> None:
    plan = make_plan(make_config(sync={"backend": "ipc"}), shapes, nodes((8, 80.0)))
    assert plan.layout == "shared_student"
    assert "sync.backend must not be ipc where placement.layout is spread" in plan.why


def test_nccl_is_never_chosen_for_a_shared_gpu(shapes) -> None:
    plan = make_plan(make_config(sync={"backend": "nccl"}), shapes, nodes((2, 80.0)))
    assert plan.missing is not None
    assert "spread needs 3 GPUs" in plan.missing


def test_where_no_layout_fits_the_one_that_needs_least_of_each_gpu_is_shown(shapes) -> None:
    for cluster, layout in (((3, 4.0), "spread"), ((2, 4.0), "shared_student"), ((1, 4.0), "one_gpu")):
        plan = make_plan(make_config(), shapes, nodes(cluster))
        assert (plan.layout, plan.missing is None) == (layout, False)


def test_no_gpu_at_all_is_no_layout(shapes) -> None:
    plan = make_plan(make_config(), shapes, [])
    assert plan.missing is not None
    assert plan.missing.startswith(
        "placement.layout: no layout fits no GPU: spread needs 3 GPUs; shared_student needs 2"
    )


# ----------------------------------------------------------------------------------------------------- what is refused


def test_a_layout_that_is_asked_for_is_refused_with_the_gib_that_it_needs(shapes) -> None:
    plan = make_plan(make_config(placement={"layout": "one_gpu"}), shapes, nodes((4, 16.0)))
    with pytest.raises(UserError) as refused:
        check_fits(plan)
    needed = sum(bundle.gib for bundle in plan.bundles)
    assert f"placement.layout: one_gpu needs {needed:.1f} GiB of one GPU (teacher engine " in str(refused.value)
    assert str(refused.value).endswith("; there is 4 GPUs of 16.0 GiB")
    assert "\n" not in str(refused.value)


def test_exactly_what_is_said_to_be_needed_suffices(shapes) -> None:
    config = make_config(placement={"layout": "one_gpu"})
    too_small = make_plan(config, shapes, nodes((1, 20.0)))
    parts_gib = sum(actor.gib for bundle in too_small.bundles for actor in bundle.actors)
    assert too_small.missing is not None
    fits = make_plan(config, shapes, nodes((1, parts_gib / 0.95 + 0.01)))
    assert fits.missing is None
    assert make_plan(config, shapes, nodes((1, parts_gib / 0.95 - 0.2))).missing is not None


def test_a_teacher_too_large_for_its_share_is_refused_naming_the_setting(shapes) -> None:
    plan = make_plan(make_config(engines={"teacher": {"gpu_memory_gib": 6.0}}), shapes, nodes((3, 80.0)))
    assert plan.missing is not None
    assert "spread needs" in plan.missing
    assert "GiB for the teacher engine, and engines.teacher.gpu_memory_gib gives it 6.0" in plan.missing


def test_tensor_parallelism_makes_it_fit(shapes) -> None:
    teacher = Qwen2Config(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
    )
    large = Shapes(student=shapes.student, teacher=shape_of(teacher))
    assert make_plan(make_config(), large, nodes((8, 40.0))).missing is not None
    four = make_config(engines={"teacher": {"tensor_parallel_size": 4}})
    assert make_plan(four, large, nodes((8, 40.0))).layout == "spread"
    quantized = make_config(engines={"teacher": {"quantization": "fp8", "tensor_parallel_size": 2}})
    assert make_plan(quantized, large, nodes((8, 40.0))).layout == "spread"


@pytest.mark.parametrize(
    ("engines", "cluster", "strategy", "said"),
    [
        (
            {"tensor_parallel_size": 4},
            [(2, 80.0)] * 3,
            "PACK",
            "spread needs 4 GPUs on one node for one of",
        ),
        ({}, [(2, 80.0)] * 2, "STRICT_PACK", "spread needs 3 GPUs on one node (STRICT_PACK)"),
        ({}, [(8, 80.0)] * 2, "STRICT_SPREAD", "spread needs 4 nodes with [1, 1, 1, 0] GPUs (STRICT_SPREAD)"),
    ],
)
def test_gpus_must_lie_together_where_they_are_needed_together(shapes, engines, cluster, strategy, said) -> None:
    placement = {"strategy": strategy, "layout": "spread"}
    config = make_config(engines={"teacher": engines}, placement=placement)
    plan = make_plan(config, shapes, nodes(*cluster))
    assert plan.missing is not None
    assert said in plan.missing


# --------------------------------------------------------------------------------------------------------- shared GPUs


def test_engines_on_a_shared_gpu_are_told_how_much_they_may_take(shapes) -> None:
    plan = make_plan(make_config(), shapes, nodes((1, 80.0)))
    (bundle,) = plan.bundles
    assert [actor.name for actor in bundle.actors] == ["teacher engine", "student engine", "learner"]
    assert set(plan.budgets) == {"student", "teacher"}
    for role, actor in zip(("teacher", "student"), bundle.actors, strict=False):
        assert actor.cache is not None
        assert plan.budgets[role].kv_cache_gib == actor.cache.gib > 0
        assert plan.budgets[role].gpu_memory_gib == pytest.approx(actor.gib)
    assert bundle.gib <= 80.0
    assert bundle.kept_free_gib == pytest.approx(4.0)


def test_all_that_is_left_of_a_tight_gpu_is_divided_by_need(shapes) -> None:
    engines = {"student": {"max_num_seqs": 256}, "teacher": {"max_num_seqs": 256}}
    plan = make_plan(make_config(engines=engines), shapes, nodes((1, 30.0)))
    (bundle,) = plan.bundles
    teacher, student, _ = (actor.cache for actor in bundle.actors)
    assert bundle.gib == pytest.approx(30.0)
    assert teacher is not None
    assert student is not None
    assert teacher.gib / student.gib == pytest.approx(teacher.gib_per_sequence / student.gib_per_sequence)
    assert 1 <= teacher.num_sequences < 256


def test_an_engine_alone_on_its_gpus_is_told_nothing(shapes) -> None:
    plan = make_plan(make_config(), shapes, nodes((2, 80.0)))
    assert set(plan.budgets) == {"student"}
    assert make_plan(make_config(), shapes, nodes((3, 80.0))).budgets == {}


def test_the_users_own_shares_come_first(shapes) -> None:
    engines = {"student": {"gpu_memory_gib": 9.0}, "teacher": {"kv_cache_gib": 3.0}}
    plan = make_plan(make_config(engines=engines), shapes, nodes((1, 80.0)))
    assert plan.budgets["teacher"].kv_cache_gib == 3.0
    assert plan.budgets["student"].gpu_memory_gib == 9.0
    (bundle,) = plan.bundles
    assert bundle.actors[1].gib == pytest.approx(9.0)
    too_much = make_config(engines={"student": {"gpu_memory_utilization": 0.9}})
    assert "of one GPU (teacher engine" in str(make_plan(too_much, shapes, nodes((1, 80.0))).missing)


def test_an_evaluation_has_no_learner_to_leave_room_for(shapes) -> None:
    plan = make_plan(make_config(), shapes, nodes((1, 80.0)), with_learner=False)
    assert [actor.name for bundle in plan.bundles for actor in bundle.actors] == ["teacher engine", "student engine"]
    assert make_plan(make_config(), shapes, nodes((2, 80.0)), with_learner=False).layout == "spread"


def test_where_the_memory_is_not_known_only_what_shares_nothing_is_planned(shapes) -> None:
    assert make_plan(make_config(), shapes, nodes((3, None))).layout == "spread"
    plan = make_plan(make_config(), shapes, nodes((2, None)))
    assert "shared_student divides a GPU whose memory nvidia-smi does not report" in str(plan.missing)


# ----------------------------------------------------------------------------------------------------------- processors


def test_on_processors_weights_go_through_host_memory() -> None:
    plan = processor_plan(make_config(), "no GPU found")
    assert str(plan) == "processors (no GPU found), weights by host_memory"
    with pytest.raises(UserError, match=r"^sync\.backend must be host_memory or auto on CPUs \(no GPU found\), got"):
        processor_plan(make_config(sync={"backend": "nccl"}), "no GPU found")


# ------------------------------------------------------------------------------------------------------------- printing


def shown(plan: Plan, config: RunConfig, shapes: Shapes, cluster: list[Node]) -> str:
    text = io.StringIO()
    show_plan(plan, config, shapes, cluster, Console(file=text, width=200))
    return text.getvalue()


def test_a_plan_s_table_adds_up(shapes) -> None:
    config, cluster = make_config(), nodes((8, 80.0))
    plan = make_plan(config, shapes, cluster)
    text = shown(plan, config, shapes, cluster)
    assert "placement: spread (8 GPUs of 80.0 GiB), weights by nccl" in text
    assert "it fits: 3 of 8 GPUs; 5 stay idle" in text
    rows = [line.split() for line in text.splitlines() if line.strip()]
    numbers = [float(row[-1]) for row in rows if row[-1].replace(".", "").isdigit() and "total" not in row]
    assert sum(numbers) == pytest.approx(sum(bundle.gib for bundle in plan.bundles), abs=0.1)


def test_a_hub_model_is_read_beside_the_file_and_a_missing_one_named(tmp_path: Path) -> None:
    qwen(**QWEN_05B).save_pretrained(tmp_path / "models" / "org" / "small")
    config = make_config(models={"student": "org/small", "teacher": "org/no such"})  # no name that is asked for
    with pytest.raises(
        UserError, match=r"^models\.teacher: can't read the config of 'org/no such': .*config\.json in "
    ):
        read_shapes(config, beside=tmp_path / "run.yaml")
    qwen(**QWEN_3B).save_pretrained(tmp_path / "teacher")
    config = make_config(models={"student": "org/small", "teacher": str(tmp_path / "teacher")})
    shapes = read_shapes(config, beside=tmp_path / "run.yaml")
    assert shapes.student.num_parameters == 494_032_768
    assert shapes.teacher.source == str(tmp_path / "teacher")
