from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import JSD, SKD, AdaSwitch, ForwardKL
from common.config.source import ResolvedConfig, dump_config, read_config
from common.config.yaml_text import dump_scalar
from common.errors import UserError

REQUIRED = """
run_dir: runs/one
models: {student: org/small, teacher: org/large}
data: {path: prompts.jsonl}
"""
Read = Callable[..., ResolvedConfig]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    path = tmp_path_factory.mktemp("config") / "run.yaml"

    def read_text(text: str = "", *overrides: str, required: str = REQUIRED) -> ResolvedConfig:
        path.write_text(required + text, encoding="utf-8")
        return read_config(path, list(overrides))

    return read_text


def refusal(read: Read, text: str = "", *overrides: str, required: str = REQUIRED) -> str:
    with pytest.raises(UserError) as raised:
        read(text, *overrides, required=required)
    return str(raised.value)


# ------------------------------------------------------------------------------------------------------------- values


def test_every_leaf_knows_where_its_value_came_from(read):
    resolved = read("trainer: {num_steps: 7}", "trainer.learning_rate=1e-3")
    assert resolved.config.trainer.num_steps == 7
    assert resolved.config.trainer.learning_rate == 1e-3
    assert resolved.origins["trainer.num_steps"] == "file"
    assert resolved.origins["trainer.learning_rate"] == "--set"
    assert resolved.origins["trainer.max_grad_norm"] == "default"
    assert resolved.origins["policy.divergence.type"] == "default"


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("trainer.num_steps=5", "num_steps", 5),
        ("trainer.learning_rate=1e-3", "learning_rate", 1e-3),
        ("trainer.learning_rate=.5", "learning_rate", 0.5),
        ("trainer.betas=[0.8, 0.9]", "betas", (0.8, 0.9)),
        ("trainer.loss={type: jsd, beta: 0.2}", "loss", JSD(beta=0.2)),
        ("trainer.loss.type=jsd", "loss", JSD()),
    ],
)
def test_set_values_are_yaml(read, written, key, value):
    assert getattr(read("", written).config.trainer, key) == value


@pytest.mark.parametrize("text", ["#### (.+)", "answer: (.*)", "no", "1:30", "2024-01-01", "", "a=b"])
def test_plain_text_is_taken_as_it_stands(read, text):
    resolved = read("", f"data.prompt_field={text}" if text else "data.prompt_field=''")
    assert resolved.config.data.prompt_field == text


def test_the_last_of_two_overrides_of_a_key_wins(read):
    assert read("", "seed=1", "seed=2").config.seed == 2


def test_a_part_without_a_type_is_of_its_defaults_type(read):
    assert read("policy: {window: 4}").config.policy == AdaSwitch(window=4)
    assert read("", "policy.window=4").config.policy == AdaSwitch(window=4)


def test_a_part_that_is_off_can_be_set_from_outside(read):
    assert read("evaluation: null", "evaluation.data.path=held_out.jsonl").config.evaluation is not None


@pytest.mark.parametrize("overrides", [("policy.type=skd", "policy.top_k=3"), ("policy.top_k=3", "policy.type=skd")])
def test_another_type_replaces_the_part_whatever_the_order_of_the_arguments(read, overrides):
    resolved = read("policy: {type: adaswitch, window: 4, floor: 0.1}", *overrides)
    assert resolved.config.policy == SKD(top_k=3)
    assert resolved.origins["policy.type"] == "--set"


def test_the_same_type_keeps_the_rest_of_the_part(read):
    resolved = read("policy: {window: 4}", "policy.type=adaswitch")
    assert resolved.config.policy == AdaSwitch(window=4)
    assert resolved.origins["policy.window"] == "file"


def test_an_inner_type_replaces_the_inner_part_only(read):
    resolved = read(
        "policy: {type: adaswitch, window: 4, divergence: {type: jsd, beta: 0.2}}", "policy.divergence.type=forward_kl"
    )
    assert resolved.config.policy == AdaSwitch(window=4, divergence=ForwardKL())


def test_parts_shared_by_an_anchor_are_changed_one_by_one(read):
    engines = read(
        "engines: {student: &e {num_threads: 2}, teacher: *e}", "engines.teacher.num_threads=3"
    ).config.engines
    assert (engines.student.num_threads, engines.teacher.num_threads) == (2, 3)


def test_a_mapping_is_one_setting_whose_entries_are_given_one_by_one(read):
    text = "engines: {teacher: {vllm: {seed: 3, compilation_config: {mode: 0}}}}"
    given = {"seed": 3, "compilation_config": {"mode": 0}}
    for overrides, expected, origin in (
        ((), given, "file"),
        (("engines.teacher.vllm.block_size=32", "engines.teacher.vllm.seed=4"), {**given, "seed": 4}, "--set"),
    ):
        resolved = read(text, *overrides)
        assert resolved.config.engines.teacher.vllm == {**expected, **({"block_size": 32} if overrides else {})}
        assert resolved.origins["engines.teacher.vllm"] == origin
        assert read(required=dump_config(resolved)).config == resolved.config
    assert resolved.origins["engines.student.vllm"] == "default"


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "override", "expected"),
    [
        ("policy: {windw: 3}", None, "policy.windw is not a setting (file); did you mean policy.window?"),
        ("", "polcy.window=3", "polcy is not a setting (--set); did you mean policy?"),
        ("", "window=3", "window is not a setting (--set); did you mean policy.window?"),
        (
            "policy: {type: skd, window: 3}",
            None,
            "policy.window is not a setting (file); it belongs to policy.type adaswitch, not to skd",
        ),
        ("", "trainer.loss.zzz=1", "trainer.loss.zzz is not a setting (--set); trainer.loss has type"),
        ("policy: {window: 0}", None, "policy.window must be >= 1, got 0 (file)"),
        ("", "trainer.learning_rate=0", "trainer.learning_rate must be > 0, got 0 (--set)"),
        ("", "trainer.loss={type: jsd, beta: 1}", "trainer.loss.beta must be < 1, got 1 (--set)"),
        ("trainer: {num_steps: abc}", None, "trainer.num_steps must be a whole number, got 'abc' (file)"),
        ("trainer: {num_steps: true}", None, "trainer.num_steps must be a whole number, got true (file)"),
        ("", "data.shuffle=no", "data.shuffle must be true or false, got 'no' (--set)"),
        ("", "data.split=2024", "data.split must be text, got 2024 (--set); write it in quotes"),
        ("", "trainer.betas=[0.9]", "trainer.betas must have more entries, got [0.9] (--set)"),
        ("", "trainer.betas=[1, 2]", "trainer.betas[1] must be <= 1, got 2 (--set)"),
        ("", "trainer.dtype=fp8", "trainer.dtype must be 'float32' or 'bfloat16', got 'fp8' (--set)"),
        ("trainer:", None, "trainer must be a mapping of settings, got nothing (file)"),
        ("", "policy=skd", "policy must be a mapping of settings, got 'skd' (--set); did you mean policy.type?"),
        ("policy: {warmup: 3}", None, "policy.warmup must be >= window (10), got 3 (file)"),
        ("evaluation: {every_steps: 3}", None, "evaluation.data.path is required, got nothing"),
        ("", "engines.teacher.vllm=3", "engines.teacher.vllm must be a mapping of settings, got 3 (--set)"),
        (
            "engines: {teacher: {vllm: {seed: 1, max_logprobs: 20}}}",
            None,
            "engines.teacher.vllm.max_logprobs has a setting of its own: use engines.top_logprobs (file)",
        ),
        (
            "",
            "engines.student.vllm.enable_prefix_caching=false",
            "engines.student.vllm.enable_prefix_caching can't be set: scoring needs the cached prefix (--set)",
        ),
        (
            "",
            "engines.student.vllm.kv_offloading_size=3",
            "engines.student.vllm.kv_offloading_size can't be set for the student: after a weight sync it would still "
            "hold states from the old weights (--set)",
        ),
        (
            "",
            "engines.student.quantization=fp8",
            "engines.student.quantization must be null: the student engine must use the trained weights unchanged; "
            "quantize the teacher, got fp8 (--set)",
        ),
    ],
)
def test_a_refusal_names_key_value_expectation_and_origin(read, text, override, expected):
    assert refusal(read, text, *([override] if override else [])) == expected


def test_an_unknown_type_lists_the_known_ones(read):
    message = refusal(read, "", "policy.type=sdk")
    assert message.startswith("policy.type must be one of adaswitch, ")
    assert message.endswith("got 'sdk' (--set); did you mean skd?")


def test_an_impossible_combination_is_named_as_our_own_check_names_it(read):
    message = refusal(read, "engines: {top_logprobs: 8}", "policy.type=skd")
    assert message == "policy.top_k must be <= engines.top_logprobs (8), got 25 (default)"


def test_several_problems_are_several_lines_and_the_misspelt_key_is_first(read):
    lines = refusal(read, required="modles: {student: a, teacher: b}\nrun_dir: x\ndata: {path: p}\nseed: x").split("\n")
    assert lines[0] == "modles is not a setting (file); did you mean models?"
    assert lines[1:] == [
        "seed must be a whole number, got 'x' (file)",
        "models.student is required, got nothing",
        "models.teacher is required, got nothing",
    ]


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", ".seed=3"])
def test_an_override_must_be_key_and_value(read, override):
    assert refusal(read, "", override).startswith("--set must be KEY=VALUE")


def test_an_override_that_is_not_yaml_is_quoted(read):
    assert refusal(read, "", "trainer.betas=[0.9").startswith("--set trainer.betas=[0.9: not YAML: line 1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2", "seed is given twice, in line 1 and in line 2"),
        ("policy: {window: 1, window: 2}", "policy.window is given twice"),
        ("seed: [1", "not YAML: line 1"),
        ("- seed", "must hold a mapping of settings, got a list"),
        ("just text", "must hold a mapping of settings, got a str"),
        ("policy.window: 3", "policy.window must be nested in a file: put window under policy"),
        ("seed: !!python/name:os.system 1", "has the tag"),
        ("policy: &p {divergence: *p}", "contains itself"),
        ('run_dir: "\\ud800"', "half a character"),
    ],
)
def test_a_file_that_yaml_would_take_in_silence_or_not_at_all_is_refused(read, text, expected):
    message = refusal(read, required=text)
    assert "run.yaml" in message
    assert expected in message
    assert "\n" not in message


def test_an_empty_file_lacks_what_is_required(read):
    assert refusal(read, required="").startswith("run_dir is required, got nothing\nmodels.student is required")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"absent\.yaml: No such file"):
        read_config(tmp_path / "absent.yaml")
    (tmp_path / "latin1.yaml").write_bytes(b"run_dir: \xe9")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_config(tmp_path / "latin1.yaml")


# --------------------------------------------------------------------------------------------------------------- dump


def test_each_leaf_is_dumped_with_its_origin_in_line(read):
    lines = dump_config(read("policy: {window: 4}", "seed=3")).splitlines()
    leaves = [line for line in lines if not line.endswith(":")]
    assert len({line.rindex("  # ") for line in leaves}) == 1
    assert any(line.split() == ["window:", "4", "#", "file"] for line in leaves)
    assert any(line.split() == ["seed:", "3", "#", "--set"] for line in leaves)


@st.composite
def settings(draw: st.DrawFn) -> dict[str, object]:
    text = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["1e-3", "no", "null", "a: b", "# x"])
    positive = st.integers(1, 10**9)
    share = st.floats(0.0, 1.0)
    part = st.fixed_dictionaries
    divergences = st.sampled_from([{"type": "forward_kl"}, {"type": "reverse_kl"}]) | part(
        {"type": st.just("jsd")}, optional={"beta": st.floats(0.01, 0.99)}
    )
    policies = part({}, optional={"window": positive, "floor": st.floats(0.0, 1e6), "divergence": divergences}) | part(
        {"type": st.just("skd")}, optional={"top_k": st.integers(1, 64)}
    )
    data = part({"path": text}, optional={"name": st.none() | text, "answer_field": text, "shuffle": st.booleans()})
    return draw(
        part(
            {"run_dir": text, "models": part({"student": text, "teacher": text}), "data": data},
            optional={
                "seed": st.integers(-(10**20), 10**20),
                "policy": policies,
                "evaluation": st.none() | part({"data": data, "answer_pattern": text}),
                "trainer": part(
                    {},
                    optional={
                        "loss": divergences,
                        "betas": st.tuples(share, share).map(list),
                        "learning_rate": st.floats(1e-300, 1e300),
                    },
                ),
            },
        )
    )


@given(written=settings())
def test_what_is_dumped_is_read_back_equal(read, written):
    resolved = read(required=dump_scalar(written))
    again = read(required=dump_config(resolved))
    assert again.config == resolved.config
    assert set(again.origins) == set(resolved.origins)
    assert set(again.origins.values()) == {"file"}
