import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.config import JSD, TVD, CrossEntropy, Divergence, ForwardKL, Loss, ReverseKL, SkewedKL
from common.divergence import divergence
from trainer.loss import SMALLEST_TAIL, PositionLosses, Targets, distillation_losses, teacher_buckets

KINDS: list[Divergence] = [ForwardKL(), ReverseKL(), JSD(beta=0.5), JSD(beta=0.1), SkewedKL(), TVD()]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
losses_of_all_kinds = pytest.mark.parametrize("kind", [*KINDS, CrossEntropy()], ids=str)
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
        case SkewedKL(alpha=alpha):
            return kl(p, alpha * p + (1 - alpha) * q)
        case TVD():
            return (p - q).abs().sum(dim=-1) / 2


def identity_layer(vocabulary_size: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    """With it logits stand in for hidden states."""
    layer = nn.Linear(vocabulary_size, vocabulary_size, bias=False, dtype=dtype)
    nn.init.eye_(layer.weight).requires_grad_(False)
    return layer


def targets_of(
    teacher_logits_NV: Tensor, k: int, weights_N: Tensor | None = None, token_ids_N: Tensor | None = None
) -> Targets:
    """The teacher's list of k; each position counts once and holds token 0 unless told."""
    top = teacher_logits_NV.log_softmax(dim=-1).topk(k)
    num_positions = len(teacher_logits_NV)
    return Targets(
        token_ids=torch.zeros(num_positions, dtype=torch.int64) if token_ids_N is None else token_ids_N,
        teacher_ids=top.indices,
        teacher_logprobs=top.values,
        weights=torch.ones(num_positions) if weights_N is None else weights_N,
    )


def student_at(
    student_logits_NV: Tensor, targets: Targets, kind: Loss, positions_per_chunk: int = 100
) -> PositionLosses:
    layer = identity_layer(student_logits_NV.shape[-1], student_logits_NV.dtype)
    return distillation_losses(student_logits_NV, layer, targets, kind, positions_per_chunk)


def losses_at(teacher_logits_NV: Tensor, student_logits_NV: Tensor, kind: Loss, k: int) -> Tensor:
    return student_at(student_logits_NV, targets_of(teacher_logits_NV, k), kind).losses


def plain_losses(logits_NV: Tensor, targets: Targets, kind: Loss) -> Tensor:
    """[N] The same loss on all positions at once, left to autograd; ids must be the student's. What the fused one is
    held against.
    """
    log_q_NV = logits_NV.log_softmax(dim=-1)
    if isinstance(kind, CrossEntropy):
        return -log_q_NV.gather(1, targets.token_ids[:, None])[:, 0]
    log_p_NM = teacher_buckets(targets.teacher_ids, targets.teacher_logprobs, logits_NV.shape[-1])
    log_tail_N1 = log_q_NV.scatter(1, targets.teacher_ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return divergence(log_p_NM, torch.cat([log_q_NV.gather(1, targets.teacher_ids), log_tail_N1], dim=-1), kind)


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
    result = student_at(student, targets_of(teacher, k), kind)
    result.total.backward()  # type: ignore[no-untyped-call]
    assert result.losses.abs().max() < 1e-5
    assert student.grad is not None
    # The total variation distance has a kink there.
    assert kind == TVD() or student.grad.abs().max() < 1e-5


@given(seed=SEEDS, vocabulary_size=st.integers(2, 40), sharpness=st.floats(0.1, 20.0))
def test_cross_entropy_is_that_of_the_token_whatever_the_teacher_says(
    seed: int, vocabulary_size: int, sharpness: float
) -> None:
    teacher, student = (random_logits(seed + i, 5, vocabulary_size, sharpness) for i in range(2))
    token_ids = torch.arange(5) * 7 % vocabulary_size
    targets = targets_of(teacher, k=1, token_ids_N=token_ids)
    expected = nn.functional.cross_entropy(student, token_ids, reduction="none")
    torch.testing.assert_close(student_at(student, targets, CrossEntropy()).losses, expected)


@kinds
def test_float32_agrees_with_float64(kind: Divergence) -> None:
    teacher, student = random_logits(1, 50, 2000), random_logits(2, 50, 2000)
    double = losses_at(teacher, student, kind, k=64)
    single = losses_at(teacher.float(), student.float(), kind, k=64)
    torch.testing.assert_close(single, double.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("height", [80.0, 400.0])
def test_a_tail_far_below_float32_resolution_keeps_its_digits(height: float) -> None:
    """The teacher is undecided between the student's favourite and all the rest."""
    student = torch.zeros(1, 1000)
    student[0, 3] = height
    targets = Targets(
        token_ids=torch.tensor([3]),
        teacher_ids=torch.tensor([[3]]),
        teacher_logprobs=torch.tensor([[0.5]]).log(),
        weights=torch.ones(1),
    )
    log_tail = torch.tensor(999.0).log() - height
    expected = torch.tensor(0.5).log() - 0.5 * log_tail
    torch.testing.assert_close(student_at(student, targets, ForwardKL()).losses[0], expected)


def test_the_teachers_tail_is_what_the_list_leaves() -> None:
    top = random_logits(1, 20, 30).log_softmax(dim=-1).topk(6)
    rest = (1 - top.values.exp().sum(dim=-1)).log()
    torch.testing.assert_close(teacher_buckets(top.indices, top.values, 30)[:, -1], rest)


def test_covered_mass_is_the_teachers_on_the_list() -> None:
    teacher = random_logits(1, 20, 30)
    top = teacher.log_softmax(dim=-1).topk(6)
    for kind in (ForwardKL(), CrossEntropy()):
        covered = student_at(teacher, targets_of(teacher, 6), kind, 7).covered_mass
        torch.testing.assert_close(covered, top.values.exp().sum(dim=-1))


@pytest.mark.parametrize("excess", [1.0, 1.0 + 1e-6])
@kinds
def test_a_list_that_adds_up_to_1_or_a_little_more_keeps_the_loss_finite(kind: Divergence, excess: float) -> None:
    targets = Targets(
        token_ids=torch.tensor([4]),
        teacher_ids=torch.tensor([[4, 9]]),
        teacher_logprobs=torch.tensor([[0.75, 0.25]]).mul(excess).log(),
        weights=torch.ones(1),
    )
    student = torch.zeros(1, 50, requires_grad=True)
    result = student_at(student, targets, kind, 1)
    result.total.backward()  # type: ignore[no-untyped-call]
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
    result = student_at(student, targets_of(teacher, k), kind)
    result.total.backward()  # type: ignore[no-untyped-call]
    assert result.losses.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@kinds
def test_a_list_that_holds_only_ids_the_student_lacks_teaches_nothing(kind: Divergence) -> None:
    teacher = torch.full((1, 16), -20.0, dtype=torch.float64)
    teacher[0, 14:] = 0.0
    student = random_logits(2, 1, 12).requires_grad_()
    result = student_at(student, targets_of(teacher, 2), kind)
    result.total.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert abs(result.losses.item()) < 1e-15
    assert result.covered_mass.item() == 0.0
    assert not student.grad.any()


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


def random_layer(seed: int, hidden_size: int, vocabulary_size: int, *, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(hidden_size, vocabulary_size, bias=bias, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.data = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    return layer


@losses_of_all_kinds
@pytest.mark.parametrize("k", [1, 4, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_the_derivative(kind: Loss, k: int, bias: bool) -> None:
    """gradcheck in float64, through hidden states and the output layer, the positions counting differently."""
    hidden = random_logits(0, 5, 3, sharpness=1.0).requires_grad_()
    layer = random_layer(1, 3, 7, bias=bias)
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0], dtype=torch.float64)
    targets = targets_of(random_logits(3, 5, 7), k, weights, token_ids_N=torch.tensor([0, 6, 2, 2, 5]))

    def total(hidden_NH: Tensor, *_: Tensor) -> Tensor:
        return distillation_losses(hidden_NH, layer, targets, kind, 2).total

    assert torch.autograd.gradcheck(total, (hidden, *layer.parameters()))


@losses_of_all_kinds
@pytest.mark.parametrize("k", [1, 6])
def test_loss_and_gradient_are_those_autograd_finds(kind: Loss, k: int) -> None:
    hidden = random_logits(0, 17, 8, sharpness=1.0).requires_grad_()
    layer = random_layer(1, 8, 40, bias=True)
    targets = targets_of(random_logits(3, 17, 40), k, torch.linspace(0.0, 2.0, 17, dtype=torch.float64))
    fused = distillation_losses(hidden, layer, targets, kind, 5)
    plain = plain_losses(layer(hidden), targets, kind)
    torch.testing.assert_close(fused.losses, plain.detach())
    leaves = (hidden, *layer.parameters())
    expected = torch.autograd.grad((targets.weights * plain).sum(), leaves)
    for gradient, other in zip(torch.autograd.grad(fused.total, leaves), expected, strict=True):
        torch.testing.assert_close(gradient, other)


@losses_of_all_kinds
@pytest.mark.parametrize("positions_per_chunk", [1, 3, 16, 17, 1000])
def test_the_size_of_a_chunk_changes_neither_loss_nor_gradient(kind: Loss, positions_per_chunk: int) -> None:
    def run(chunk: int) -> tuple[Tensor, ...]:
        hidden = random_logits(0, 17, 8, sharpness=1.0).float().requires_grad_()
        layer = random_layer(1, 8, 40).float()
        result = distillation_losses(hidden, layer, targets_of(random_logits(3, 17, 40).float(), 5), kind, chunk)
        return result.losses, *torch.autograd.grad(result.total, (hidden, layer.weight))

    for chunked, whole in zip(run(positions_per_chunk), run(17), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_the_total_may_be_scaled_and_its_gradient_asked_for_again_but_not_differentiated_twice() -> None:
    hidden = random_logits(0, 4, 3).requires_grad_()
    total = distillation_losses(hidden, random_layer(1, 3, 9), targets_of(random_logits(3, 4, 9), 2), TVD(), 3).total
    (once,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(-2.5 * total, hidden, retain_graph=True)
    torch.testing.assert_close(scaled, -2.5 * once)
    for _ in range(3):
        total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(hidden.grad, 3 * once)
    (of_square,) = torch.autograd.grad(total**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        of_square.sum().backward()  # type: ignore[no-untyped-call]


class Watch(TorchDispatchMode):
    """Counts matrix products and remembers how large the largest new tensor was."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, ...]] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        outcome = func(*args, **(kwargs or {}))
        if isinstance(outcome, Tensor):
            self.largest = max(self.largest, outcome.numel())
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                self.products.append(tuple(outcome.shape))
        return outcome


@settings(max_examples=20)
@given(num_positions=st.integers(1, 50), positions_per_chunk=st.integers(1, 60))
def test_logits_are_computed_once_and_never_for_more_than_a_chunk(num_positions: int, positions_per_chunk: int) -> None:
    vocabulary_size = 500
    hidden = random_logits(1, num_positions, 2).requires_grad_()
    layer = random_layer(1, 2, vocabulary_size)
    targets = targets_of(random_logits(2, num_positions, vocabulary_size), 3)
    with Watch() as watch:
        distillation_losses(hidden, layer, targets, ForwardKL(), positions_per_chunk).total.backward()  # type: ignore[no-untyped-call]
    logits = [rows for rows, columns in watch.products if columns == vocabulary_size]
    assert sum(logits) == num_positions
    assert watch.largest <= max(min(num_positions, positions_per_chunk), 2) * vocabulary_size


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_positions_times_vocabulary() -> None:
    vocabulary_size, num_positions = 5000, 64
    layer = nn.Linear(8, vocabulary_size, bias=False)
    hidden = torch.randn(num_positions, 8, requires_grad=True)
    targets = targets_of(torch.randn(num_positions, vocabulary_size), 4)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        distillation_losses(hidden, layer, targets, ForwardKL(), 8)
    assert max(kept) == layer.weight.numel()


@losses_of_all_kinds
def test_bfloat16_logits_are_taken_to_float32_first(kind: Loss) -> None:
    targets = targets_of(random_logits(1, 20, 500).float(), 8)
    student = random_logits(2, 20, 500).bfloat16()
    half = student_at(student, targets, kind, 7).losses
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, student_at(student.float(), targets, kind, 7).losses)


def test_under_autocast_the_products_are_low_and_the_gradient_is_the_parameters() -> None:
    hidden = random_logits(0, 33, 16, sharpness=1.0).float().requires_grad_()
    layer = random_layer(1, 16, 200).float()
    targets = targets_of(random_logits(3, 33, 200).float(), 8)

    def run() -> tuple[Tensor, ...]:
        result = distillation_losses(hidden, layer, targets, ForwardKL(), 4)
        return result.losses, *torch.autograd.grad(result.total, (hidden, layer.weight))

    high = run()
    with torch.autocast("cpu", torch.bfloat16):
        low = run()
    for rough, exact in zip(low, high, strict=True):
        assert rough.dtype == torch.float32
        assert 0.0 < float((rough - exact).norm() / exact.norm()) < 0.02
