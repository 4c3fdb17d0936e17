import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.config import LoRA, Trainer
from common.errors import UserError
from common.sequence import MixedSequence, TopLogprobs
from tests.support.probing import check_sync, read_probe
from trainer.batch import collate
from trainer.learner import Learner
from trainer.lora import add_adapter
from trainer.probe import WeightSyncError
from trainer.probe_statistics import ProbeReport
from trainer.weight_sender import LearnerWeights, named_weights

Make = Callable[..., PreTrainedModel]
Save = Callable[..., str]
Written = Callable[..., list[MixedSequence]]


def config(**trainer: Any) -> Trainer:
    return Trainer(**{"learning_rate": 1e-2, "num_threads": 1, "lora": LoRA(rank=4), "packing": False, **trainer})


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def student(make_model: Make, save_model: Save, request: pytest.FixtureRequest) -> str:
    return save_model(make_model(seed=2, tied=request.param))


@pytest.fixture
def taught(student: str, make_model: Make, written_by: Written) -> Learner:
    """A learner whose adapter is no longer nothing."""
    learner = Learner(student, config(), seed=0)
    for _ in range(3):
        learner.step(written_by(make_model(seed=1)))
    return learner


def merged_by_peft(learner: Learner) -> dict[str, Tensor]:
    """Every weight of a checkpoint by name, from peft's own merging of a copy."""
    merged: PreTrainedModel = copy.deepcopy(learner.adapter).merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}


def test_an_adapter_changes_nothing_until_it_is_trained(make_model: Make) -> None:
    model, adapted = make_model(seed=2), make_model(seed=2)
    add_adapter(adapted, LoRA())
    input_ids = torch.arange(12)[None]
    torch.testing.assert_close(adapted(input_ids=input_ids).logits, model(input_ids=input_ids).logits)


def test_what_is_sent_is_what_peft_merges_under_the_names_of_a_model_without_adapter(
    taught: Learner, student: str
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(student)
    source = LearnerWeights(taught.model, dtype=torch.float32)
    sent = dict(source)
    expected = merged_by_peft(taught)
    assert list(sent) == list(named_weights(plain))
    assert [meta.name for meta in source.metadata()] == list(sent)
    assert [tuple(meta.shape) for meta in source.metadata()] == [tuple(tensor.shape) for tensor in sent.values()]
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.0, atol=1e-6)
    changed = {name for name, tensor in sent.items() if not torch.equal(tensor, named_weights(plain)[name])}
    assert changed == {name for name in sent if "_proj." in name}


def test_only_the_adapter_is_trained_and_the_loss_falls(student: str, make_model: Make, written_by: Written) -> None:
    sequences = written_by(make_model(seed=1))
    learner = Learner(student, config(), seed=0)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    losses = [learner.step(sequences).loss for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    changed = {name for name, tensor in learner.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".lora_" in name for name in changed)
    num_trained = sum(p.numel() for group in learner.optimizer.param_groups for p in group["params"])
    assert num_trained == sum(tensor.numel() for name, tensor in before.items() if ".lora_" in name)


def test_the_first_gradient_of_b_is_that_of_the_whole_weight_seen_through_a(
    student: str, make_model: Make, written_by: Written
) -> None:
    """With B = 0, d loss / d B = scale * (d loss / d W) A^T: the fused loss serves both kinds of training alike."""
    sequences = written_by(make_model(seed=1))
    learners = [Learner(student, config(lora=lora), seed=0) for lora in (None, LoRA(rank=4, alpha=8.0))]
    micro_batch = collate(sequences)
    for learner in learners:
        shares = torch.full((len(micro_batch),), 1.0 / len(micro_batch), dtype=torch.float64)
        learner.position_losses(micro_batch, shares).total.backward()  # type: ignore[no-untyped-call]
    whole, adapted = (learner.model.model.layers[1].self_attn.q_proj for learner in learners)
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    torch.testing.assert_close(b.grad, 2.0 * whole.weight.grad @ a.T, rtol=1e-3, atol=1e-6)


def test_a_saved_student_is_merged_and_its_adapter_lies_beside_it(
    taught: Learner, student: str, tmp_path: Path
) -> None:
    taught.save(tmp_path / "out")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), tmp_path / "out" / "adapter")
    input_ids = torch.arange(12)[None]
    expected = taught.model(input_ids=input_ids).logits
    for model in (saved, again):
        torch.testing.assert_close(model(input_ids=input_ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for name, parameter in taught.model.named_parameters() if ".lora_" in name)
    assert {name for name, _ in saved.named_parameters()} == {
        name for name, _ in AutoModelForCausalLM.from_pretrained(student).named_parameters()
    }


def test_a_sync_that_left_a_layer_out_is_traced_to_it(student: str, make_model: Make, written_by: Written) -> None:
    learner = Learner(student, config(), seed=0)
    previous = {name: tensor.clone() for name, tensor in LearnerWeights(learner.model, dtype=torch.float32)}
    for _ in range(5):
        learner.step(written_by(make_model(seed=1)))
    sent = dict(LearnerWeights(learner.model, dtype=torch.float32))
    engine = AutoModelForCausalLM.from_pretrained(student).eval()
    stale = {name: previous[name] if ".layers.1." in name else tensor for name, tensor in sent.items()}
    text = np.arange(10, dtype=np.int32)

    def rows(weights: dict[str, Tensor]) -> list[TopLogprobs]:
        engine.load_state_dict(weights, strict=False)
        ids = np.tile(np.arange(48, dtype=np.int32), (text.size, 1))
        blank = TopLogprobs(ids, np.zeros(ids.shape, np.float32))
        return [TopLogprobs(ids, read_probe(engine, [text], [blank])[0])]

    def check(engine_rows: list[TopLogprobs]) -> ProbeReport:
        return check_sync(learner.model, lambda: previous, [text], engine_rows, tolerance=1e-4)

    assert check(rows(sent)).max_difference < 1e-4
    with pytest.raises(WeightSyncError, match=r"behaves as if model\.layers\.1 had kept its old values"):
        check(rows(stale))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("lm_head", "'lm_head', the output layer, which the loss computes itself"),
        ("q_porj", "'q_porj' is not a linear layer of LlamaForCausalLM, expected some of .*'q_proj'"),
        ("embed_tokens", "'embed_tokens' is not a linear layer"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_refused(make_model: Make, target: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^trainer\.lora\.target_modules: .*{message}"):
        add_adapter(make_model(), LoRA(target_modules=("q_proj", target)))


def test_only_the_named_layers_are_adapted(make_model: Make) -> None:
    model = make_model()
    add_adapter(model, LoRA(target_modules=("q_proj", "model.layers.1.mlp.up_proj")))
    adapted = {name.rpartition(".lora_A")[0] for name in model.state_dict() if ".lora_A" in name}
    assert adapted == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_an_adapter_is_not_split_over_ranks() -> None:
    with pytest.raises(ValidationError, match="num_ranks must be 1 if lora is set, got 2"):
        config(num_ranks=2)
