import pytest
from pydantic import ValidationError

from common.config import (
    SKD,
    AdaSwitch,
    Data,
    Dataset,
    Decay,
    Engines,
    Mixture,
    Models,
    Part,
    Policy,
    RunConfig,
    Trainer,
)


def run_config(**parts: object) -> RunConfig:
    required = {"run_dir": "run", "models": {"student": "s", "teacher": "t"}, "data": {"path": "prompts.jsonl"}}
    return RunConfig.model_validate({**required, **parts})


def all_parts(part: type[Part] = Part) -> list[type[Part]]:
    return [inner for child in part.__subclasses__() for inner in (child, *all_parts(child))]


def test_a_run_needs_only_a_folder_two_models_and_prompts():
    assert run_config() == RunConfig(
        run_dir="run", models=Models(student="s", teacher="t"), data=Data(path="prompts.jsonl")
    )


@pytest.mark.parametrize("part", all_parts(), ids=lambda part: part.__name__)
def test_every_part_is_frozen_and_refuses_unknown_keys(part: type[Part]):
    assert part.model_config.get("frozen")
    assert part.model_config.get("extra") == "forbid"


def test_the_average_must_be_filled_before_a_switch():
    assert AdaSwitch(window=7).first_position == 7
    assert AdaSwitch(window=7, warmup=9).first_position == 9
    with pytest.raises(ValidationError, match=r"warmup must be >= window \(7\), got 3"):
        AdaSwitch(window=7, warmup=3)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300])
@pytest.mark.parametrize(
    ("policy", "key"),
    [(AdaSwitch, "multiplier"), (AdaSwitch, "floor"), (Decay, "initial_threshold"), (Decay, "rate")],
)
def test_a_threshold_must_be_a_number_that_float32_can_hold(policy: type[Part], key: str, value: float):
    with pytest.raises(ValidationError, match=key):
        policy(**{key: value})


def test_a_policy_cannot_look_further_than_the_lists_reach():
    with pytest.raises(ValidationError, match=r"policy.top_k must be <= engines.top_logprobs \(8\), got 25"):
        run_config(policy=SKD(), engines=Engines(top_logprobs=8))


@pytest.mark.parametrize("policy", [Dataset(), Mixture(rest="dataset")], ids=lambda policy: policy.type)
def test_given_answers_need_a_column(policy: Policy):
    with pytest.raises(ValidationError, match=f"data.answer_field must name .* policy.type {policy.type}"):
        run_config(policy=policy)
    data = Data(path="p", answer_field="answer")
    assert run_config(policy=policy, data=data).takes_given_answers
    assert not run_config(policy=Mixture(), data=data).takes_given_answers


def test_given_answers_alone_must_count():
    with pytest.raises(ValidationError, match=r"trainer\.dataset_token_weight must be > 0"):
        run_config(policy=Dataset(), data=Data(path="p", answer_field="a"), trainer=Trainer(dataset_token_weight=0.0))


def test_a_setting_of_another_policy_cannot_be_written():
    with pytest.raises(ValidationError, match="Extra inputs"):
        run_config(policy={"type": "skd", "window": 3})


@pytest.mark.parametrize(
    "parts",
    [
        {"engines": {"student": {"num_replicas": 2}}},
        {"engines": {"student": {"tensor_parallel_size": 2}}},
        {"trainer": {"num_ranks": 2}},
    ],
)
def test_ipc_needs_a_learner_and_an_engine_on_one_gpu(parts: dict[str, object]):
    assert run_config(sync={"backend": "ipc"}).sync.backend == "ipc"
    with pytest.raises(ValidationError, match=r"sync\.backend must not be ipc unless"):
        run_config(sync={"backend": "ipc"}, **parts)
