from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from deploy.demo.make_models import NOT_TRAINED, STUDENT, TEACHER, Recipe, collate, make_model, train_step
from deploy.demo.measure import accuracy, complete, exact_match, forward_kl
from deploy.demo.task import make_split, write_problem
from deploy.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, make_tokenizer

MODELS = Path(__file__).parents[3] / "deploy" / "demo" / "models"
NUM_PARAMETERS = {"teacher": 643_968, "student": 108_864}


def load(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODELS / name).eval()


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return load("teacher")


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    return load("student")


@pytest.mark.parametrize("recipe", [TEACHER, STUDENT], ids=lambda recipe: recipe.name)
def test_a_shipped_model_has_the_stated_size(recipe: Recipe) -> None:
    model = load(recipe.name)
    assert model.num_parameters() == make_model(recipe).num_parameters() == NUM_PARAMETERS[recipe.name]
    assert model.get_input_embeddings().weight.shape == (32, recipe.hidden_size)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.dtype == torch.float32
    assert model.config.head_dim == 32


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_shipped_model_names_the_tokenizers_special_ids(name: str) -> None:
    model = load(name)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (PAD_ID, BOS_ID, EOS_ID)


def test_the_teacher_solves_the_held_out_prompts_step_by_step(teacher: PreTrainedModel) -> None:
    problems = make_split().held_out[:64]
    completions = complete(teacher, make_tokenizer(), problems)
    assert accuracy(completions, problems) >= 0.99
    assert exact_match(completions, problems) >= 0.98


def test_the_student_is_cut_off_half_way(student: PreTrainedModel) -> None:
    problems = make_split().held_out
    assert 0.33 <= accuracy(complete(student, make_tokenizer(), problems), problems) <= 0.43


def test_a_model_does_not_diverge_from_itself(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    completions = complete(student, make_tokenizer(), make_split().held_out[:8], sample=True)
    assert float(forward_kl(student, student, completions).abs().max()) == 0.0
    assert float(forward_kl(teacher, student, completions).min()) > -1e-6


def test_only_the_answer_and_eos_are_trained() -> None:
    short, long = write_problem([7, 3], "+"), write_problem([7, 3, 8], "+*")
    input_ids_BT, labels_BT = collate([short, long], make_tokenizer())
    assert input_ids_BT[0].tolist() == [BOS_ID, 11, 14, 7, 17, 11, 14, 7, 17, 4, 18, 4, EOS_ID] + [PAD_ID] * 8
    assert labels_BT[0].tolist() == [NOT_TRAINED] * 5 + [11, 14, 7, 17, 4, 18, 4, EOS_ID] + [NOT_TRAINED] * 8
    assert (labels_BT[1] != NOT_TRAINED).sum() == len(long.answer) + 1


def test_training_on_one_batch_lowers_its_loss() -> None:
    model = make_model(STUDENT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = collate(make_split().train[:8], make_tokenizer())
    losses = [train_step(model, optimizer, *batch) for _ in range(30)]
    assert losses[-1] < losses[0] / 2
