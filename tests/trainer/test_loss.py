import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.config import JSD, Divergence, ForwardKL, ReverseKL
from trainer.loss import SMALLEST_TAIL, distillation_losses, student_buckets, teacher_buckets

KINDS: list[Divergence] = [ForwardKL(), ReverseKL(), JSD(beta=0.5), JSD(beta=0.1)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.type}-{getattr(kind, 'beta', '')}")
SEEDS = st.integers(0, 2**32 - 1)


def random_logits(seed: int, n: int, vocabulary_size: int, sharpness: float = 3.0) -> Tensor:
    return sharpness * torch.randn(
        n, vocabulary_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def full_vocabulary(teacher_logits_NV: Tensor, student_logits_NV: Tensor, kind: Divergence) -> Tensor:
    """[N] float64 nats, by the formulas as they stand in the papers."""
    p, q = teacher_logits_NV.softmax(dim=-1), student_logits_NV.softmax(dim=-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(dim=-1)

    match kind:
        case ForwardKL():
            return kl(p, q)
        case ReverseKL():
            return kl(q, p)
        case JSD(beta=beta):
            m = beta * p + (1 - beta) * q
            return beta * kl(p, m) + (1 - beta) * kl(q, m)


def losses_at(
    teacher_logits_NV: Tensor, student_logits_NV: Tensor, kind: Divergence, k: int, positions_per_chunk: int = 100
) -> Tensor:
    """Logits stand in for hidden states and the output layer is the identity."""
    top = teacher_logits_NV.log_softmax(dim=-1).topk(k)
    return distillation_losses(
        student_logits_NV, lambda logits: logits, top.indices, top.values, kind, positions_per_chunk
    ).losses


# ---------------------------------------------------------------------------------------------------------- the value


@kinds
@given(seed=SEEDS, vocabulary_size=st.integers(2, 40), sharpness=st.floats(0.1, 8.0))
def test_with_the_whole_vocabulary_listed_the_loss_is_the_full_divergence(
    kind: Divergence, seed: int, vocabulary_size: int, sharpness: float
) -> None:
    teacher, student = (random_logits(seed + i, 5, vocabulary_size, sharpness) for i in range(2))
    losses = losses_at(teacher, student, kind, k=vocabulary_size)
    torch.testing.assert_close(losses, full_vocabulary(teacher, student, kind), rtol=1e-8, atol=1e-10)


@kinds
@given(seed=SEEDS, sharpness=st.floats(0.1, 20.0), k=st.integers(1, 24))
def test_a_shorter_list_gives_a_lower_bound(kind: Divergence, seed: int, sharpness: float, k: int) -> None:
    teacher, student = (random_logits(seed + i, 5, 24, sharpness) for i in range(2))
    losses = losses_at(teacher, student, kind, k)
    # A teacher's tail below SMALLEST_TAIL is taken to be that, which moves a loss by no more than this.
    slack = 2 * SMALLEST_TAIL * max(1.0, 2 * float(student.abs().max()))
    assert (losses <= full_vocabulary(teacher, student, kind) + slack).all()
    assert (losses >= -slack).all()


@kinds
@given(seed=SEEDS)
def test_the_bound_rises_with_the_length_of_the_list(kind: Divergence, seed: int) -> None:
    teacher, student = (random_logits(seed + i, 5, 24, sharpness=1.0) for i in range(2))
    by_k = torch.stack([losses_at(teacher, student, kind, k) for k in (1, 4, 12, 23, 24)])
    assert (by_k.diff(dim=0) >= -1e-9).all()


@kinds
@pytest.mark.parametrize("k", [1, 5, 29, 30])
def test_a_student_like_its_teacher_has_loss_0_and_no_gradient(kind: Divergence, k: int) -> None:
    teacher = random_logits(1, 50, 30, sharpness=8.0)
    student = teacher.clone().requires_grad_()
    losses = losses_at(teacher, student, kind, k)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.abs().max() < 1e-5
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-5


@kinds
def test_float32_agrees_with_float64(kind: Divergence) -> None:
    teacher, student = random_logits(1, 50, 2000), random_logits(2, 50, 2000)
    double = losses_at(teacher, student, kind, k=64)
    single = losses_at(teacher.float(), student.float(), kind, k=64)
    torch.testing.assert_close(single, double.float(), rtol=1e-4, atol=1e-5)


def test_a_tail_far_below_float32_resolution_keeps_its_digits() -> None:
    student = torch.full((1, 1000), -40.0)
    student[0, 3] = 40.0
    log_q = student_buckets(torch.tensor([[3]]), student)
    torch.testing.assert_close(log_q[0, 1], torch.tensor(999.0).log() - 80.0)


def test_the_tails_are_what_the_list_leaves() -> None:
    logits = random_logits(1, 20, 30)
    top = logits.log_softmax(dim=-1).topk(6)
    rest = (1 - top.values.exp().sum(dim=-1)).log()
    torch.testing.assert_close(teacher_buckets(top.indices, top.values, 30)[:, -1], rest)
    torch.testing.assert_close(student_buckets(top.indices, logits)[:, -1], rest)


def test_covered_mass_is_the_teachers_on_the_list() -> None:
    teacher = random_logits(1, 20, 30)
    top = teacher.log_softmax(dim=-1).topk(6)
    covered = distillation_losses(teacher, lambda x: x, top.indices, top.values, ForwardKL(), 7).covered_mass
    torch.testing.assert_close(covered, top.values.exp().sum(dim=-1))


@pytest.mark.parametrize("excess", [1.0, 1.0 + 1e-6])
@kinds
def test_a_list_that_adds_up_to_1_or_a_little_more_keeps_the_loss_finite(kind: Divergence, excess: float) -> None:
    teacher_logprobs = torch.tensor([[0.75, 0.25]]).mul(excess).log()
    student = torch.zeros(1, 50, requires_grad=True)
    result = distillation_losses(student, lambda x: x, torch.tensor([[4, 9]]), teacher_logprobs, kind, 1)
    result.losses.sum().backward()
    assert result.losses.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert result.covered_mass.item() <= 1.0


# --------------------------------------------------------------------------------------- vocabularies of different size


@kinds
@pytest.mark.parametrize("k", [3, 12, 14, 16])
def test_ids_past_the_students_vocabulary_join_the_tail(kind: Divergence, k: int) -> None:
    """The teacher's embedding is padded to 16 ids, the student's has 12. With k = 16 there is no tail either."""
    teacher = random_logits(1, 20, 16)
    student = random_logits(2, 20, 12).requires_grad_()
    losses = losses_at(teacher, student, kind, k)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@kinds
@pytest.mark.parametrize("k", [3, 12, 16])
def test_padding_that_neither_model_uses_changes_nothing(kind: Divergence, k: int) -> None:
    teacher, student = random_logits(1, 20, 12), random_logits(2, 20, 12)
    padding = torch.full((20, 4), -50.0, dtype=torch.float64)
    padded_teacher, padded_student = (torch.cat([logits, padding], dim=1) for logits in (teacher, student))
    expected = losses_at(teacher, student, kind, min(k, 12))
    torch.testing.assert_close(losses_at(padded_teacher, student, kind, k), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        losses_at(padded_teacher, padded_student, kind, min(k, 12)), expected, rtol=1e-5, atol=1e-5
    )


# -------------------------------------------------------------------------------------------------- gradients, chunks


@kinds
@pytest.mark.parametrize("k", [1, 4, 7])
def test_the_gradient_is_the_derivative(kind: Divergence, k: int) -> None:
    """gradcheck in float64, through hidden states and the output layer's weight."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    top = random_logits(3, 5, 7).log_softmax(dim=-1).topk(k)

    def losses(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        return distillation_losses(hidden_NH, lambda h: h @ weight_VH.T, top.indices, top.values, kind, 2).losses

    assert torch.autograd.gradcheck(losses, (hidden, weight))


@kinds
@pytest.mark.parametrize("positions_per_chunk", [1, 3, 16, 17, 1000])
def test_the_size_of_a_chunk_changes_neither_loss_nor_gradient(kind: Divergence, positions_per_chunk: int) -> None:
    def run(chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(17, 8, generator=generator, requires_grad=True)
        layer = torch.nn.Linear(8, 40, bias=False)
        layer.weight.data = torch.randn(40, 8, generator=generator)
        top = random_logits(3, 17, 40).float().log_softmax(dim=-1).topk(5)
        losses = distillation_losses(hidden, layer, top.indices, top.values, kind, chunk).losses
        losses.mean().backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        assert layer.weight.grad is not None
        return losses.detach(), hidden.grad, layer.weight.grad

    for chunked, whole in zip(run(positions_per_chunk), run(17), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


@settings(max_examples=20)
@given(num_positions=st.integers(1, 50), positions_per_chunk=st.integers(1, 60))
def test_logits_never_exist_for_more_than_a_chunk_of_positions(num_positions: int, positions_per_chunk: int) -> None:
    seen: list[int] = []

    def output_layer(hidden_CH: Tensor) -> Tensor:
        seen.append(len(hidden_CH))
        return hidden_CH

    logits = random_logits(1, num_positions, 10).requires_grad_()
    top = random_logits(2, num_positions, 10).log_softmax(dim=-1).topk(3)
    distillation_losses(
        logits, output_layer, top.indices, top.values, ForwardKL(), positions_per_chunk
    ).losses.sum().backward()
    assert max(seen) <= positions_per_chunk
    assert sum(seen) == 2 * num_positions  # once forward, once recomputed on the way back


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary() -> None:
    vocabulary_size, num_positions = 5000, 64
    layer = torch.nn.Linear(8, vocabulary_size, bias=False)
    hidden = torch.randn(num_positions, 8, requires_grad=True)
    top = torch.randn(num_positions, vocabulary_size).log_softmax(dim=-1).topk(4)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        distillation_losses(hidden, layer, top.indices, top.values, ForwardKL(), 8)
    assert max(kept, default=0) < 8 * vocabulary_size


def test_bfloat16_logits_are_taken_to_float32_first() -> None:
    teacher, student = random_logits(1, 20, 500).float(), random_logits(2, 20, 500).bfloat16()
    top = teacher.log_softmax(dim=-1).topk(8)
    half = distillation_losses(student, lambda x: x, top.indices, top.values, ForwardKL(), 7).losses
    full = distillation_losses(student.float(), lambda x: x, top.indices, top.values, ForwardKL(), 7).losses
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full)
