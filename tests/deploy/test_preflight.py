"""What can be wrong with a run and be said before an engine starts, on the demo's models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import RunConfig
from common.errors import UserError
from deploy.preflight import prepare

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
EOS_ID, VOCABULARY_SIZE, CONTEXT = 2, 32, 128


@pytest.fixture
def make_config(tmp_path):
    def make(**changes) -> RunConfig:
        tree = {
            "run_dir": str(tmp_path / "run"),
            "models": {"student": str(DEMO / "models/student"), "teacher": str(DEMO / "models/teacher")},
            "data": {"path": str(DEMO / "data/held_out.jsonl"), "answer_field": "answer"},
            "sampling": {"max_new_tokens": 64},
        }
        for key, value in changes.items():
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
        return RunConfig.model_validate(tree)

    return make


@pytest.fixture
def changed_model(tmp_path):
    """The demo student with some of its files' keys changed."""

    def change(file: str, **changes) -> str:
        folder = tmp_path / "changed"
        if not folder.exists():
            shutil.copytree(DEMO / "models/student", folder)
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **changes}))
        return str(folder)

    return change


def test_what_both_engines_must_agree_on_is_found(make_config) -> None:
    inputs = prepare(make_config())
    assert inputs.stop_token_ids == (EOS_ID,)
    assert inputs.max_model_len == CONTEXT
    assert inputs.top_logprobs == VOCABULARY_SIZE  # 64 are asked for, the vocabulary has 32
    assert inputs.held_out is None
    assert inputs.self_test_prefix.size == 15


def test_the_shorter_context_holds_for_both(make_config) -> None:
    engines = {"student": {"max_model_len": 100}, "teacher": {"max_model_len": 90}}
    assert prepare(make_config(engines=engines)).max_model_len == 90


def test_a_token_that_ends_either_models_text_ends_both(make_config, changed_model) -> None:
    teacher = changed_model("generation_config.json", eos_token_id=[EOS_ID, 18])
    models = {"student": str(DEMO / "models/student"), "teacher": teacher}
    assert prepare(make_config(models=models)).stop_token_ids == (EOS_ID, 18)


def test_held_out_prompts_come_in_the_order_of_the_file(make_config) -> None:
    evaluation = {"data": {"path": str(DEMO / "data/held_out.jsonl"), "answer_field": "answer", "max_prompts": 3}}
    held_out = prepare(make_config(evaluation=evaluation)).held_out
    assert held_out is not None
    assert [prompt.prompt_id for prompt in held_out.prompts] == ["0", "1", "2"]
    assert held_out.decode(held_out.prompts[0].token_ids) == "7*7*9*7*3-1+4="


def test_a_context_beyond_the_models_own_is_refused(make_config) -> None:
    with pytest.raises(UserError, match=r"^engines\.teacher\.max_model_len must be <= 128.*got 200$"):
        prepare(make_config(engines={"teacher": {"max_model_len": 200}}))


def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(make_config) -> None:
    with pytest.raises(UserError, match=r"^sampling\.max_new_tokens must leave room.*128 tokens, got 128$"):
        prepare(make_config(sampling={"max_new_tokens": 128}))


def test_a_prompt_longer_than_the_context_leaves_names_its_row(make_config) -> None:
    with pytest.raises(UserError, match=r"^data\.prompt_field: row 0 has 15 tokens, expected 1 to 14"):
        prepare(make_config(sampling={"max_new_tokens": 114}))


def test_tokenizers_that_differ_are_refused_with_an_example(make_config, changed_model) -> None:
    tokenizer = json.loads((DEMO / "models/student/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["z"] = vocabulary.pop("a")
    teacher = changed_model("tokenizer.json", **tokenizer)
    models = {"student": str(DEMO / "models/student"), "teacher": teacher}
    with pytest.raises(UserError, match="1 ids differ: id 19 is 'a' for the student and 'z' for the teacher"):
        prepare(make_config(models=models))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_missing_model_folder_names_the_key(role, make_config) -> None:
    models = {"student": str(DEMO / "models/student"), "teacher": str(DEMO / "models/teacher"), role: "./absent"}
    with pytest.raises(UserError, match=rf"^models\.{role}: no such folder: './absent'"):
        prepare(make_config(models=models))


def test_an_answer_pattern_that_is_no_expression_is_refused(make_config) -> None:
    evaluation = {"data": {"path": str(DEMO / "data/held_out.jsonl")}, "answer_pattern": "("}
    with pytest.raises(UserError, match=r"^evaluation\.answer_pattern: got '\('"):
        prepare(make_config(evaluation=evaluation))


def test_given_answers_come_with_the_prompts_and_end_with_the_stop_token(make_config) -> None:
    data = {"answer_field": "solution"}
    prompt = prepare(make_config(policy={"type": "dataset"}, data=data)).prompts.all()[0]
    assert prompt.answer_token_ids is not None
    assert (prompt.answer_token_ids.size, prompt.answer_token_ids[-1]) == (38, EOS_ID)
    assert prepare(make_config(data=data)).prompts.all()[0].answer_token_ids is None


def test_given_answers_are_as_long_as_what_a_model_may_write(make_config) -> None:
    config = make_config(policy={"type": "dataset"}, data={"answer_field": "solution"}, sampling={"max_new_tokens": 37})
    with pytest.raises(UserError, match=r"^data\.answer_field: row 0 has 38 tokens.*, expected at most 37"):
        prepare(config)


def test_a_model_with_code_of_its_own_is_read_where_that_is_trusted(make_config, changed_model) -> None:
    """Its configuration is asked for end tokens too, where nothing else names them."""
    model = changed_model("config.json", auto_map={"AutoConfig": "configuration_own.OwnConfig"}, model_type="own")
    (Path(model) / "generation_config.json").unlink()
    (Path(model) / "configuration_own.py").write_text(
        "from transformers import PreTrainedConfig\n\n\nclass OwnConfig(PreTrainedConfig):\n    model_type = 'own'\n"
    )
    models = {"student": model, "teacher": str(DEMO / "models/teacher")}
    assert prepare(make_config(models=models, engines={"trust_remote_code": True})).stop_token_ids == (EOS_ID,)
    with pytest.raises(UserError, match=r"^models\.student: can't read .*trust_remote_code=True"):
        prepare(make_config(models=models))


def test_an_argument_that_vllm_does_not_have_is_refused_before_an_engine_starts(make_config) -> None:
    with pytest.raises(
        UserError, match=r"^engines\.teacher\.vllm\.block_sise is not an .*; did you mean block_size\?$"
    ):
        prepare(make_config(engines={"teacher": {"vllm": {"seed": 3, "block_sise": 32}}}))


def test_a_student_whose_weights_are_quantized_is_refused_and_a_teacher_is_not(make_config, changed_model) -> None:
    quantized = changed_model("config.json", quantization_config={"quant_method": "fp8"})
    prepare(make_config(models={"teacher": quantized}))
    with pytest.raises(UserError, match=r"^models\.student: .*changed has quantized weights; expected weights that"):
        prepare(make_config(models={"student": quantized}))


def test_vllm_is_not_imported_where_it_is_asked_nothing() -> None:
    """It takes seconds."""
    code = (
        "import sys; from common.config.source import read_config; from deploy.preflight import prepare; "
        f"config = read_config('{DEMO.parent}/configs/demo.yaml').config; prepare(config); "
        "assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=DEMO.parents[1])
