import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from common.config import JSD, TVD, CrossEntropy, Divergence, ForwardKL, ReverseKL, SkewedKL, Trainer
from common.errors import UserError
from common.sequence import MixedSequence, TokenSource, TopLogprobs
from trainer.batch import collate
from trainer.learner import Learner, StepReport, learning_rate_factor
from trainer.pretrained import load_pretrained, load_tokenizer, refuse_changed_logits, refuse_leaking_rows

Written = Callable[..., list[MixedSequence]]
Save = Callable[..., str]
Make = Callable[..., PreTrainedModel]
VOCABULARY_SIZE = 48
TINY = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config(**knobs: Any) -> Trainer:
    return Trainer(**{"learning_rate": 1e-2, "max_grad_norm": 1e6, **knobs})


def gradients(learner: Learner, sequences: list[MixedSequence]) -> dict[str, torch.Tensor]:
    """The gradient of a step, caught before the optimizer clears it."""
    caught: dict[str, torch.Tensor] = {}

    def catch(*_: object) -> None:
        caught.update({name: p.grad.clone() for name, p in learner.model.named_parameters()})

    handle = learner.optimizer.register_step_pre_hook(catch)
    learner.step(sequences)
    handle.remove()
    return caught


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


def without_seconds(report: StepReport) -> StepReport:
    return replace(report, seconds=0.0)


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("kind", [ForwardKL(), ReverseKL(), JSD(), SkewedKL(), TVD()], ids=lambda kind: kind.type)
@pytest.mark.parametrize("tied", [False, True])
def test_a_student_taught_by_itself_has_loss_0(
    make_model: Make, save_model: Save, written_by: Written, kind: Divergence, tied: bool
) -> None:
    model = make_model(tied=tied)
    report = Learner(save_model(model), config(loss=kind), seed=0).step(written_by(model))
    assert abs(report.loss) < 1e-5
    # The total variation distance has a kink there: its gradient does not fade, it is the sign of rounding errors.
    assert kind == TVD() or report.grad_norm < 1e-3


@pytest.mark.parametrize("shift", [-1, 1])
def test_rows_shifted_by_one_position_are_noticed(
    make_model: Make, save_model: Save, written_by: Written, shift: int
) -> None:
    """The alignment test: the same distributions, one position off, are far away."""
    model = make_model()
    shifted = [
        replace(
            sequence,
            teacher_top=TopLogprobs(
                np.roll(sequence.teacher_top.token_ids, shift, axis=0),
                np.roll(sequence.teacher_top.logprobs, shift, axis=0),
            ),
        )
        for sequence in written_by(model)
    ]
    assert Learner(save_model(model), config(), seed=0).step(shifted).loss > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_the_full_divergence_when_the_list_holds_the_vocabulary(
    make_model: Make, save_model: Save, written_by: Written, reference_logprobs: Callable[..., Any], tied: bool
) -> None:
    teacher, student = make_model(seed=1), make_model(seed=2, tied=tied)
    sequences = written_by(teacher, k=VOCABULARY_SIZE)
    expected = []
    for sequence in sequences:
        log_p, log_q = (
            reference_logprobs(model, sequence.prompt.token_ids, sequence.token_ids).astype(np.float64)
            for model in (teacher, student)
        )
        expected.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    report = Learner(save_model(student), config(), seed=0).step(sequences)
    assert report.loss == pytest.approx(np.concatenate(expected).mean(), rel=1e-4)
    assert report.covered_mass == pytest.approx(1.0, abs=1e-5)


def test_student_and_teacher_tokens_are_reported_apart(make_model: Make, save_model: Save, written_by: Written) -> None:
    student = save_model(make_model(seed=2))
    sequences = written_by(make_model(seed=1), num_student_tokens=2)
    report = Learner(student, config(), seed=0).step(sequences)
    assert report.loss_student_tokens is not None
    assert report.loss_teacher_tokens is not None
    num_tokens = sum(map(len, sequences))
    num_student_tokens = 2 * len(sequences)
    together = num_student_tokens * report.loss_student_tokens
    together += (num_tokens - num_student_tokens) * report.loss_teacher_tokens
    assert report.loss == pytest.approx(together / num_tokens, rel=1e-5)
    assert report.num_tokens == num_tokens
    covered = np.concatenate([sequence.teacher_top.covered_mass() for sequence in sequences]).mean()
    assert report.covered_mass == pytest.approx(covered, rel=1e-5)

    student_only = Learner(student, config(), seed=0).step(written_by(make_model(seed=1)))
    assert student_only.loss_teacher_tokens is None
    assert student_only.loss_student_tokens == pytest.approx(student_only.loss)


def test_cross_entropy_is_that_of_the_written_tokens(
    make_model: Make, save_model: Save, written_by: Written, reference_logprobs: Callable[..., Any]
) -> None:
    student = make_model(seed=2)
    sequences = written_by(make_model(seed=1), num_student_tokens=2)
    expected = [
        -np.take_along_axis(
            reference_logprobs(student, sequence.prompt.token_ids, sequence.token_ids),
            sequence.token_ids[:, None].astype(np.int64),
            axis=1,
        )
        for sequence in sequences
    ]
    report = Learner(save_model(student), config(loss=CrossEntropy()), seed=0).step(sequences)
    assert report.loss == pytest.approx(np.concatenate(expected).mean(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- token weights


def test_the_loss_is_the_weighted_mean_over_the_step(make_model: Make, save_model: Save, written_by: Written) -> None:
    student = save_model(make_model(seed=2))
    sequences = written_by(make_model(seed=1), num_student_tokens=2)
    plain = Learner(student, config(), seed=0).step(sequences)
    assert plain.loss_student_tokens is not None
    assert plain.loss_teacher_tokens is not None
    num_student = 2 * len(sequences)
    num_teacher = plain.num_tokens - num_student
    weighted = Learner(student, config(student_token_weight=0.5, teacher_token_weight=2.0), seed=0).step(sequences)
    expected = 0.5 * num_student * plain.loss_student_tokens + 2.0 * num_teacher * plain.loss_teacher_tokens
    assert weighted.loss == pytest.approx(expected / (0.5 * num_student + 2.0 * num_teacher), rel=1e-5)
    # What is reported of either's tokens does not depend on how much they count.
    assert weighted.loss_student_tokens == pytest.approx(plain.loss_student_tokens)
    assert weighted.loss_teacher_tokens == pytest.approx(plain.loss_teacher_tokens)


def test_the_gradient_is_the_weighted_mean_of_the_gradients_of_either_ones_tokens(
    make_model: Make, save_model: Save, written_by: Written
) -> None:
    student = save_model(make_model(seed=2))
    sequences = written_by(make_model(seed=1), num_student_tokens=2)
    num_student = 2 * len(sequences)
    num_teacher = sum(map(len, sequences)) - num_student

    def gradient(**weights: float) -> dict[str, torch.Tensor]:
        return gradients(Learner(student, config(tokens_per_micro_batch=54, **weights), seed=0), sequences)

    ours, theirs = gradient(teacher_token_weight=0.0), gradient(student_token_weight=0.0)
    both = gradient(student_token_weight=3.0, teacher_token_weight=1.5)
    share = 3.0 * num_student / (3.0 * num_student + 1.5 * num_teacher)
    for name, value in both.items():
        torch.testing.assert_close(value, share * ours[name] + (1 - share) * theirs[name], rtol=1e-4, atol=1e-6)


def test_given_answers_count_by_their_own_weight(make_model: Make, save_model: Save, written_by: Written) -> None:
    student = save_model(make_model(seed=2))
    theirs, mine = written_by(make_model(seed=1), num=2)
    given = replace(theirs, sources=np.full(len(theirs), TokenSource.DATASET, np.uint8))
    report = Learner(student, config(dataset_token_weight=3.0), seed=0).step([given, mine])
    assert report.loss_teacher_tokens is None
    assert report.loss_student_tokens is not None
    assert report.loss_dataset_tokens is not None
    expected = 3.0 * len(given) * report.loss_dataset_tokens + len(mine) * report.loss_student_tokens
    assert report.loss == pytest.approx(expected / (3.0 * len(given) + len(mine)), rel=1e-5)


def test_only_the_ratio_of_the_weights_matters(make_model: Make, save_model: Save, written_by: Written) -> None:
    student = save_model(make_model(seed=2))
    sequences = written_by(make_model(seed=1), num_student_tokens=2)
    once, twice = (
        gradients(
            Learner(student, config(student_token_weight=scale, teacher_token_weight=3 * scale), seed=0), sequences
        )
        for scale in (1.0, 1000.0)
    )
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value, rtol=1e-5, atol=1e-7)


def test_a_step_whose_tokens_all_have_weight_0_has_no_loss(student: str, sequences: list[MixedSequence]) -> None:
    """The student wrote everything and only the teacher's tokens count."""
    learner = Learner(student, config(student_token_weight=0.0), seed=0)
    before = weights(learner)
    report = learner.step(sequences)
    assert (report.loss, report.grad_norm) == (0.0, 0.0)
    assert report.loss_student_tokens is not None
    assert report.loss_student_tokens > 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights(learner).items())


def test_some_token_must_count() -> None:
    with pytest.raises(ValidationError, match="teacher_token_weight must be > 0 if student_token_weight is 0, got 0"):
        Trainer(student_token_weight=0.0, teacher_token_weight=0.0)
    with pytest.raises(ValidationError, match="finite"):
        Trainer(student_token_weight=math.inf)


# -------------------------------------------------------------------------------------------- micro-batches and chunks


@pytest.fixture
def student(make_model: Make, save_model: Save) -> str:
    return save_model(make_model(seed=2))


@pytest.fixture
def sequences(make_model: Make, written_by: Written) -> list[MixedSequence]:
    return written_by(make_model(seed=1), num=8)


@pytest.mark.parametrize(("budget", "num_micro_batches"), [(16384, 1), (100, 2), (54, 4), (1, 8)])
def test_the_gradient_is_the_same_however_the_step_is_cut_into_micro_batches(
    student: str, sequences: list[MixedSequence], budget: int, num_micro_batches: int
) -> None:
    whole = gradients(Learner(student, config(), seed=0), sequences)
    learner = Learner(student, config(tokens_per_micro_batch=budget), seed=0)
    cut = gradients(learner, sequences)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert learner.step(sequences).num_micro_batches == num_micro_batches


@pytest.mark.parametrize("positions_per_chunk", [1, 5, 64])
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_is_the_same_for_any_size_of_chunk(
    make_model: Make, save_model: Save, sequences: list[MixedSequence], positions_per_chunk: int, tied: bool
) -> None:
    student = save_model(make_model(seed=2, tied=tied))
    whole = gradients(Learner(student, config(), seed=0), sequences)
    chunked = gradients(Learner(student, config(positions_per_chunk=positions_per_chunk), seed=0), sequences)
    assert ("lm_head.weight" in whole) != tied
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-5, atol=1e-6)


def test_padding_and_neighbours_do_not_touch_a_sequences_loss(student: str, sequences: list[MixedSequence]) -> None:
    learner = Learner(student, config(), seed=0)

    def losses_of(sequences: list[MixedSequence]) -> torch.Tensor:
        micro_batch = collate(sequences)
        return learner.position_losses(micro_batch, torch.ones(len(micro_batch))).losses

    alone = torch.cat([losses_of([sequence]) for sequence in sequences])
    torch.testing.assert_close(losses_of(sequences), alone, rtol=1e-5, atol=1e-6)


def test_the_order_of_the_sequences_changes_nothing(student: str, sequences: list[MixedSequence]) -> None:
    learners = [Learner(student, config(tokens_per_micro_batch=54), seed=0) for _ in range(2)]
    reports = [learners[0].step(sequences), learners[1].step(sequences[::-1])]
    assert without_seconds(reports[0]) == without_seconds(reports[1])
    for name, weight in weights(learners[0]).items():
        assert torch.equal(weight, weights(learners[1])[name])


# ------------------------------------------------------------------------------------------------ packing and memory


def test_packed_sequences_do_not_see_each_other(student: str, sequences: list[MixedSequence]) -> None:
    learner = Learner(student, config(packing=True), seed=0)

    def losses_of(sequences: list[MixedSequence]) -> torch.Tensor:
        micro_batch = collate(sequences, packed=learner.packed)
        return learner.position_losses(micro_batch, torch.ones(len(micro_batch))).losses

    alone = torch.cat([losses_of([sequence]) for sequence in sequences])
    torch.testing.assert_close(losses_of(sequences), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention may be there")
def test_nothing_is_packed_without_flash_attention_unless_asked_for(student: str) -> None:
    assert not Learner(student, config(dtype="bfloat16"), seed=0).packed
    assert Learner(student, config(packing=True), seed=0).packed


def test_a_model_that_pays_no_heed_to_position_ids_is_not_packed(make_model: Make) -> None:
    model = make_model()
    refuse_leaking_rows(model)
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    with pytest.raises(
        UserError, match=r"^trainer\.packing: LlamaForCausalLM lets packed sequences attend to each other"
    ):
        refuse_leaking_rows(model)


@pytest.mark.parametrize("packing", [False, True])
def test_recomputed_activations_give_the_same_gradient_and_are_computed_twice(
    student: str, sequences: list[MixedSequence], packing: bool
) -> None:
    found = {}
    for recompute in (False, True):
        learner = Learner(student, config(activation_checkpointing=recompute, packing=packing), seed=0)
        calls: list[int] = []
        learner.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found[recompute] = gradients(learner, sequences)
        assert len(calls) == (2 if recompute else 1)
        assert not any(module.training for module in learner.model.modules())
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- optimization


def test_steps_on_the_same_sequences_bring_the_loss_down(student: str, sequences: list[MixedSequence]) -> None:
    learner = Learner(student, config(max_grad_norm=1.0), seed=0)
    losses = [learner.step(sequences).loss for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_same_seed_gives_the_same_run(student: str, sequences: list[MixedSequence]) -> None:
    runs = [Learner(student, config(), seed=3) for _ in range(2)]
    reports = [[without_seconds(learner.step(sequences)) for _ in range(3)] for learner in runs]
    assert reports[0] == reports[1]


def test_a_gradient_is_clipped_and_reported_before(student: str, sequences: list[MixedSequence]) -> None:
    free = gradients(Learner(student, config(), seed=0), sequences)
    norm = float(torch.stack([gradient.norm() for gradient in free.values()]).norm())
    learner = Learner(student, config(max_grad_norm=norm / 4), seed=0)
    clipped = gradients(learner, sequences)
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient / 4, rtol=1e-4, atol=1e-7)
    assert Learner(student, config(max_grad_norm=1e-3), seed=0).step(sequences).grad_norm == pytest.approx(norm)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    schedule = Trainer(num_steps=10, warmup_steps=3, decay_fraction=0.4)
    factors = [learning_rate_factor(step, schedule) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert [learning_rate_factor(step, Trainer(num_steps=4)) for step in range(4)] == [1.0] * 4
    assert learning_rate_factor(99, schedule) == 0.0


def test_a_report_names_the_learning_rate_of_its_own_step(student: str, sequences: list[MixedSequence]) -> None:
    learner = Learner(student, config(num_steps=4, warmup_steps=1, decay_fraction=0.25), seed=0)
    assert [learner.step(sequences).learning_rate for _ in range(4)] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3])


def test_weight_decay_is_for_matrices(student: str) -> None:
    groups = Learner(student, config(weight_decay=0.1), seed=0).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {parameter.ndim for parameter in groups[0]["params"]} == {2}
    assert {parameter.ndim for parameter in groups[1]["params"]} == {1}


def test_bfloat16_computes_low_and_keeps_float32_weights(student: str, sequences: list[MixedSequence]) -> None:
    low, high = (Learner(student, config(dtype=dtype), seed=0) for dtype in ("bfloat16", "float32"))
    assert low.step(sequences).loss == pytest.approx(high.step(sequences).loss, rel=0.05)
    assert {weight.dtype for weight in weights(low).values()} == {torch.float32}


def test_dropout_is_off(make_model: Make, save_model: Save, written_by: Written) -> None:
    model = make_model()
    model.config.attention_dropout = 0.5
    learner = Learner(save_model(model), config(), seed=0)
    assert learner.model.config.attention_dropout == 0.5
    assert abs(learner.step(written_by(model)).loss) < 1e-5
    assert not learner.model.training


# -------------------------------------------------------------------------------------------------- values not finite


def test_a_loss_that_is_not_finite_names_its_sequence_and_changes_nothing(
    student: str, sequences: list[MixedSequence]
) -> None:
    learner = Learner(student, config(loss=ReverseKL()), seed=0)
    before = weights(learner)
    logprobs = sequences[3].teacher_top.logprobs.copy()
    logprobs[1, 0] = -np.inf
    broken = replace(sequences[3], teacher_top=TopLogprobs(sequences[3].teacher_top.token_ids, logprobs))
    with pytest.raises(FloatingPointError, match=r"^the loss is not finite at 1 of \d+ tokens, in 3\.0\.0$"):
        learner.step([*sequences[:3], broken, *sequences[4:]])
    assert all(torch.equal(weight, before[name]) for name, weight in weights(learner).items())
    assert learner.step(sequences).loss > 0


def test_a_gradient_that_is_not_finite_names_the_sequences(student: str, sequences: list[MixedSequence]) -> None:
    learner = Learner(student, config(), seed=0)
    before = weights(learner)
    handle = learner.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        FloatingPointError, match=r"grad_norm is (inf|nan) after finite losses, in a step of 0\.0\.0, 1"
    ):
        learner.step(sequences)
    handle.remove()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(learner).items())
    assert learner.step(sequences).loss > 0


# ------------------------------------------------------------------------------------------------------ probe and save


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_student_loads_again_as_it_is(
    make_model: Make, save_model: Save, sequences: list[MixedSequence], tmp_path: Path, tied: bool
) -> None:
    learner = Learner(save_model(make_model(seed=2, tied=tied)), config(), seed=0)
    learner.step(sequences)
    for _ in range(2):  # the second time over the first
        learner.save(tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "student"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in weights(learner).items():
        assert torch.equal(again.get_parameter(name), weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == learner.tokenizer.get_vocab()


def test_what_a_crash_left_unfinished_is_no_obstacle(student: str, tmp_path: Path) -> None:
    (tmp_path / ".saved.unfinished").mkdir()
    (tmp_path / ".saved.unfinished" / "rubbish").write_text("")
    Learner(student, config(), seed=0).save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "rubbish").exists()
    assert (tmp_path / "saved" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("load", [load_pretrained, load_tokenizer])
@pytest.mark.parametrize("name", ["./nothing", "/nothing", "~/nothing", "runs/7/student"])
def test_a_missing_folder_is_refused_at_once(load: Callable[..., Any], name: str) -> None:
    with pytest.raises(UserError, match=r"^models.teacher: no such folder") as caught:
        load(name, key="models.teacher")
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("load", [load_pretrained, load_tokenizer])
def test_a_folder_without_a_model_is_refused(load: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^models.student: the folder .* has no config.json"):
        load(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no such thing"}'])
def test_a_bad_config_is_refused(student: str, content: str) -> None:
    (Path(student) / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"^models.student: can't load a causal language model"):
        load_pretrained(student)


def test_a_model_that_does_not_write_is_refused(tmp_path: Path) -> None:
    BertModel(BertConfig(**{**TINY, "num_key_value_heads": None})).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"^models.student: "):
        load_pretrained(str(tmp_path / "bert"))


def test_a_damaged_weight_file_is_refused(student: str) -> None:
    (Path(student) / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"^models.student: can't load"):
        load_pretrained(student)


def test_pickled_weights_are_not_read(student: str) -> None:
    path = Path(student) / "model.safetensors"
    torch.save(load_file(path), Path(student) / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(UserError, match=r"^models.student: can't load .*safetensors"):
        load_pretrained(student)


def test_missing_weights_are_refused_and_not_made_up(student: str) -> None:
    path = Path(student) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights .*: model\.layers\.1\.mlp\.up_proj\.weight$"):
        load_pretrained(student)


def test_weights_of_another_shape_are_refused(student: str) -> None:
    path = Path(student) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 65}))
    with pytest.raises(UserError, match=r"^models.student: "):
        load_pretrained(student)


def test_a_folder_without_a_tokenizer_is_refused(make_model: Make, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"^models.student: can't load a tokenizer"):
        load_tokenizer(str(tmp_path / "bare"))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8)), "sets final_logit_softcapping in its config"),
        (lambda: CohereForCausalLM(CohereConfig(**TINY)), "changes its logits after its output layer"),
    ],
    ids=["soft-capped", "scaled"],
)
def test_a_model_that_changes_its_logits_is_refused(
    save_model: Save, model: Callable[[], PreTrainedModel], reason: str
) -> None:
    with pytest.raises(UserError, match=rf"^models.student: .*{reason}"):
        Learner(save_model(model()), config(), seed=0)


def test_an_output_layer_the_loss_cannot_differentiate_is_refused(make_model: Make) -> None:
    model = make_model()
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(
        UserError, match=r"^models.student: the output layer of .* is a Sequential, expected a torch.nn"
    ):
        refuse_changed_logits(model)


def test_a_model_of_another_family_is_taught_alike(save_model: Save, written_by: Written) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    ).eval()
    report = Learner(save_model(model), config(), seed=0).step(written_by(model))
    assert abs(report.loss) < 1e-5
