import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config import JSD, TVD, Divergence, ForwardKL, ReverseKL, SkewedKL
from common.divergence import divergence

KINDS: list[Divergence] = [
    ForwardKL(),
    ReverseKL(),
    JSD(),
    JSD(beta=0.1),
    JSD(beta=0.9),
    SkewedKL(),
    SkewedKL(alpha=0.7),
    TVD(),
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


@st.composite
def distribution_pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of two distributions over the same 2 to 12 buckets, some of them empty."""
    num_buckets = draw(st.integers(2, 12))
    weights = st.lists(st.just(0.0) | st.floats(1e-6, 1.0), min_size=num_buckets, max_size=num_buckets).filter(any)
    p, q = (torch.tensor(draw(weights), dtype=torch.float64) for _ in range(2))
    return (p / p.sum()).log(), (q / q.sum()).log()


def by_definition(p: np.ndarray, q: np.ndarray, kind: Divergence) -> float:
    def kl(a: np.ndarray, b: np.ndarray) -> float:
        with np.errstate(divide="ignore"):
            return float(sum(x * np.log(x / y) for x, y in zip(a, b, strict=True) if x > 0))

    match kind:
        case ForwardKL():
            return kl(p, q)
        case ReverseKL():
            return kl(q, p)
        case JSD(beta=beta):
            mixture = beta * p + (1 - beta) * q
            return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
        case SkewedKL(alpha=alpha):
            return kl(p, alpha * p + (1 - alpha) * q)
        case TVD():
            return 0.5 * float(np.abs(p - q).sum())


@kinds
@given(pair=distribution_pairs())
def test_it_agrees_with_the_definition(kind, pair):
    log_p, log_q = pair
    expected = by_definition(log_p.exp().numpy(), log_q.exp().numpy(), kind)
    assert float(divergence(log_p, log_q, kind)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@kinds
@given(pair=distribution_pairs())
def test_it_is_never_negative_nor_nan(kind, pair):
    assert float(divergence(*pair, kind)) >= -1e-12


@kinds
@given(pair=distribution_pairs())
def test_a_distribution_does_not_diverge_from_itself(kind, pair):
    assert float(divergence(pair[0], pair[0], kind)) == pytest.approx(0.0, abs=1e-12)


@kinds
@given(pair=distribution_pairs(), data=st.data())
def test_merging_buckets_never_increases_it(kind, pair, data):
    log_p, log_q = pair
    num_merged = data.draw(st.integers(2, len(log_p)))
    merged = [torch.cat([log[num_merged:], log[:num_merged].logsumexp(0, keepdim=True)]) for log in pair]
    assert float(divergence(*merged, kind)) <= float(divergence(log_p, log_q, kind)) + 1e-12


@given(pair=distribution_pairs())
def test_reverse_kl_is_forward_kl_with_the_models_exchanged(pair):
    log_p, log_q = pair
    assert divergence(log_p, log_q, ReverseKL()) == divergence(log_q, log_p, ForwardKL())


@given(pair=distribution_pairs())
def test_jsd_at_one_half_does_not_tell_the_models_apart(pair):
    log_p, log_q = pair
    there, back = divergence(log_p, log_q, JSD(beta=0.5)), divergence(log_q, log_p, JSD(beta=0.5))
    torch.testing.assert_close(there, back)


@given(pair=distribution_pairs())
def test_the_total_variation_distance_is_a_probability_and_symmetric(pair):
    log_p, log_q = pair
    value = float(divergence(log_p, log_q, TVD()))
    assert value <= 1.0 + 1e-12
    assert value == float(divergence(log_q, log_p, TVD()))


@given(pair=distribution_pairs(), alpha=st.floats(0.01, 0.99))
def test_skewed_kl_is_bounded_and_below_the_share_of_forward_kl_it_leaves_to_the_student(pair, alpha):
    """KL is convex in its second argument: KL(p || a p + (1 - a) q) <= a KL(p || p) + (1 - a) KL(p || q)."""
    log_p, log_q = pair
    value = float(divergence(log_p, log_q, SkewedKL(alpha=alpha)))
    assert value <= -np.log(alpha) + 1e-12
    assert value <= (1 - alpha) * float(divergence(log_p, log_q, ForwardKL())) + 1e-12


def test_distributions_that_share_nothing_are_as_far_apart_as_can_be():
    log_p, log_q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    assert float(divergence(log_p, log_q, TVD())) == 1.0
    assert float(divergence(log_p, log_q, SkewedKL(alpha=0.1))) == pytest.approx(np.log(10))


def test_kl_tells_the_models_apart():
    log_p, log_q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    assert not torch.isclose(divergence(log_p, log_q, ForwardKL()), divergence(log_p, log_q, ReverseKL()))


def test_mass_of_the_teacher_where_the_student_has_none_diverges_without_bound():
    log_p, log_q = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert divergence(log_p, log_q, ForwardKL()) == torch.inf
    assert torch.isfinite(divergence(log_p, log_q, ReverseKL()))
    for bounded in (JSD(), SkewedKL(), TVD()):
        assert torch.isfinite(divergence(log_p, log_q, bounded))


@kinds
def test_empty_buckets_give_no_nan_in_value_or_gradient(kind):
    log_p = torch.tensor([0.6, 0.4, 0.0]).log().requires_grad_()
    log_q = torch.tensor([0.3, 0.7, 0.0]).log().requires_grad_()
    value = divergence(log_p, log_q, kind)
    value.backward()
    assert torch.isfinite(value)
    for log in (log_p, log_q):
        assert log.grad is not None
        assert torch.isfinite(log.grad).all()


@kinds
def test_the_gradient_is_the_derivative_in_both_arguments(kind):
    logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p, log_q = (row.log_softmax(-1).requires_grad_() for row in logits)
    assert torch.autograd.gradcheck(lambda p, q: divergence(p, q, kind), (log_p, log_q))


@kinds
def test_rows_do_not_mix(kind):
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    together = divergence(logits[0], logits[1], kind)
    assert together.shape == (3, 4)
    torch.testing.assert_close(together[1, 2], divergence(logits[0, 1, 2], logits[1, 1, 2], kind))
