"""V = vocabulary, n = rows, k = length of a list, p the teacher, q the student."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import JSD, Divergence, ForwardKL, ReverseKL
from common.divergence import divergence
from common.sequence import Floats, TopLogprobs
from rollout_server.verifier import compare

KINDS: list[Divergence] = [ForwardKL(), ReverseKL(), JSD(beta=0.1), JSD(beta=0.9)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.type}-{getattr(kind, 'beta', '')}")


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """As in a rollout actor. With more, and other work on the machine, tiny sums wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


few = settings(max_examples=30)  # of 12 rows each


@st.composite
def logprob_pairs(draw: st.DrawFn, num_rows: int = 12) -> tuple[Floats, Floats]:
    """[n, V] nats of a teacher and of a student that may agree, nearly agree or disagree; flat or very sure."""
    vocabulary = draw(st.integers(2, 40))
    scale, distance = (draw(st.sampled_from([0.01, 0.3, 1.0, 3.0, 10.0, 30.0])) for _ in range(2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    teacher = rng.normal(0.0, scale, (num_rows, vocabulary))
    student = draw(st.sampled_from([0.0, 0.5, 1.0])) * teacher + rng.normal(0.0, distance, teacher.shape)
    return log_softmax(teacher), log_softmax(student)


def log_softmax(logits: npt.NDArray[np.float64]) -> Floats:
    return (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)).astype(np.float32)


def top(logprobs: Floats, k: int) -> TopLogprobs:
    token_ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    return TopLogprobs(token_ids.astype(np.int32), np.take_along_axis(logprobs, token_ids, axis=1))


def over_the_vocabulary(p: Floats, q: Floats, kind: Divergence) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = divergence(
        torch.from_numpy(p).double(), torch.from_numpy(q).double(), kind
    ).numpy()
    return values


def row(*probabilities: float) -> Floats:
    assert sum(probabilities) == pytest.approx(1.0)
    return np.log(np.array([probabilities])).astype(np.float32)


@kinds
@few
@given(pair=logprob_pairs(), data=st.data())
def test_it_is_a_lower_bound_of_the_full_divergence(
    kind: Divergence, pair: tuple[Floats, Floats], data: st.DataObject
) -> None:
    teacher, student = pair
    teacher_k, student_k = data.draw(st.tuples(*[st.integers(1, teacher.shape[1])] * 2))
    values = compare(top(teacher, teacher_k), top(student, student_k), kind).divergences
    full = over_the_vocabulary(teacher, student, kind)
    assert (values >= 0.0).all()
    assert (values <= full * (1 + 1e-6) + 1e-5).all(), (values - full).max()


@kinds
@few
@given(pair=logprob_pairs())
def test_it_is_exact_with_the_whole_vocabulary(kind: Divergence, pair: tuple[Floats, Floats]) -> None:
    teacher, student = pair
    k = teacher.shape[1]
    values = compare(top(teacher, k), top(student, k), kind).divergences
    np.testing.assert_allclose(values, over_the_vocabulary(teacher, student, kind), rtol=1e-6, atol=1e-5)


@kinds
@few
@given(pair=logprob_pairs(), data=st.data())
def test_equal_distributions_do_not_diverge(kind: Divergence, pair: tuple[Floats, Floats], data: st.DataObject) -> None:
    lists = top(pair[0], data.draw(st.integers(1, pair[0].shape[1])))
    np.testing.assert_array_equal(compare(lists, lists, kind).divergences, 0.0)


@kinds
@few
@given(pair=logprob_pairs(), data=st.data())
def test_rounding_errors_of_an_engine_do_not_look_like_a_divergence(
    kind: Divergence, pair: tuple[Floats, Floats], data: st.DataObject
) -> None:
    """The same model read twice: float32 engines differ by some 1e-5 nats a log-prob."""
    logprobs = pair[0].astype(np.float64)
    error = np.random.default_rng(0).normal(0.0, 1e-5, logprobs.shape)
    k = data.draw(st.integers(1, logprobs.shape[1]))
    values = compare(top(log_softmax(logprobs), k), top(log_softmax(logprobs + error), k), kind).divergences
    np.testing.assert_array_equal(values, 0.0)


@kinds
@few
@given(pair=logprob_pairs(), data=st.data())
def test_a_row_does_not_depend_on_the_rows_beside_it(
    kind: Divergence, pair: tuple[Floats, Floats], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, pair[0].shape[1]))
    teacher, student = (top(logprobs, k) for logprobs in pair)
    together = compare(teacher, student, kind).divergences
    one_by_one = [compare(teacher[i : i + 1], student[i : i + 1], kind).divergences[0] for i in range(len(teacher))]
    np.testing.assert_array_equal(together, one_by_one)  # bit for bit


@few
@given(pair=logprob_pairs(), data=st.data())
def test_equal_log_probs_may_be_listed_in_any_order(pair: tuple[Floats, Floats], data: st.DataObject) -> None:
    """Engines break ties as they please, and list ids in no order of theirs."""
    k = data.draw(st.integers(1, pair[0].shape[1]))
    teacher, student = (top(logprobs, k) for logprobs in pair)
    renamed = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(pair[0].shape[1]).astype(np.int32)
    left = compare(teacher, student, ForwardKL()).divergences
    right = compare(
        TopLogprobs(renamed[teacher.token_ids], teacher.logprobs),
        TopLogprobs(renamed[student.token_ids], student.logprobs),
        ForwardKL(),
    ).divergences
    np.testing.assert_array_equal(left, right)


@kinds
def test_it_grows_with_the_teachers_weight_on_ids_the_student_does_not_list(kind: Divergence) -> None:
    """On the one id that both list they agree, so an intersection would see no divergence in any of these rows."""
    student = np.repeat(row(0.5, 0.45, 0.02, 0.01, 0.01, 0.01), 3, axis=0)
    teacher = np.concatenate(
        [
            row(0.5, 0.04, 0.04, 0.30, 0.08, 0.04),
            row(0.5, 0.03, 0.03, 0.36, 0.05, 0.03),
            row(0.5, 0.01, 0.01, 0.42, 0.05, 0.01),
        ]
    )
    lists = top(teacher, 3), top(student, 3)
    assert lists[0].token_ids.tolist() == [[0, 3, 4]] * 3
    assert lists[1].token_ids.tolist() == [[0, 1, 2]] * 3
    values = compare(*lists, kind).divergences
    assert values[0] > 0.01
    assert (np.diff(values) > 1e-3).all(), values


def test_lists_without_a_common_id_diverge_by_no_more_than_the_truth_allows() -> None:
    """The student may give the teacher's best id 0.45 at most, which leaves 0.55 for the rest."""
    teacher, student = row(0.9, 0.025, 0.025, 0.05), row(0.05, 0.45, 0.4, 0.1)
    values = compare(top(teacher, 1), top(student, 1), ForwardKL()).divergences
    assert values[0] == pytest.approx(0.9 * np.log(2) + 0.1 * np.log(0.1 / 0.55), abs=1e-5)
    assert values[0] < over_the_vocabulary(teacher, student, ForwardKL())[0]


def test_the_covered_masses_are_those_of_the_lists() -> None:
    verdict = compare(top(row(0.6, 0.2, 0.2), 1), top(row(0.1, 0.6, 0.3), 2), ForwardKL())
    assert verdict.teacher_mass.tolist() == pytest.approx([0.6])
    assert verdict.student_mass.tolist() == pytest.approx([0.9])


def test_arrays_that_can_not_be_written_to_are_read() -> None:
    """As they come out of Ray's object store."""
    lists = top(row(0.6, 0.3, 0.1), 2)
    lists.token_ids.flags.writeable = lists.logprobs.flags.writeable = False
    assert compare(lists, lists, ForwardKL()).divergences.tolist() == [0.0]


def test_no_rows_give_no_values() -> None:
    assert compare(TopLogprobs.empty(4), TopLogprobs.empty(4), ForwardKL()).divergences.size == 0


def test_filling_in_the_two_unknown_masses_one_by_one_would_not_be_a_bound() -> None:
    """Why the verifier looks for both at once.

    Lists of one id: A = {0}, B = {1}, nothing shared. Each mass on its own, as the lists allow it:
    q(A) = min(p(A), q_min) = 0.25 and p(B) = min(q(B), p_min) = 0.25, which leaves p = 0.5 and q = 0.05 for the rest.
    """
    teacher, student = row(0.25, 0.2, 0.2, 0.2, 0.15), row(0.1, 0.7, 0.1, 0.05, 0.05)
    one_by_one = 0.25 * np.log(0.25 / 0.25) + 0.25 * np.log(0.25 / 0.7) + 0.5 * np.log(0.5 / 0.05)
    full = over_the_vocabulary(teacher, student, ForwardKL())[0]
    assert one_by_one > full + 0.3
    assert compare(top(teacher, 1), top(student, 1), ForwardKL()).divergences[0] < full


@kinds
@few
@given(pair=logprob_pairs(num_rows=1), data=st.data())
def test_no_split_that_the_lists_allow_comes_closer(
    kind: Divergence, pair: tuple[Floats, Floats], data: st.DataObject
) -> None:
    """On a grid over (q(A), p(B)); the truth is one of these splits, but not the only one a list could hide."""
    k = data.draw(st.integers(1, pair[0].shape[1]))
    teacher, student = (top(logprobs, k) for logprobs in pair)
    p, q = (np.exp(logprobs[0].astype(np.float64)) for logprobs in pair)
    shared = np.intersect1d(teacher.token_ids, student.token_ids)
    p_A, q_B = (w[np.setdiff1d(mine.token_ids, shared)].sum() for w, mine in ((p, teacher), (q, student)))
    p_unlisted, q_unlisted = (max(1.0 - w[lists.token_ids].sum(), 0.0) for w, lists in ((p, teacher), (q, student)))
    share = np.linspace(0.0, 1.0, 31)
    q_A, p_B = np.meshgrid(
        share * min((k - shared.size) * q[student.token_ids].min(), q_unlisted),
        share * min((k - shared.size) * p[teacher.token_ids].min(), p_unlisted),
    )
    splits = [
        np.stack([*np.broadcast_arrays(*w[shared], listed_alone, q_A)[:-1], *others], axis=-1)
        for w, listed_alone, others in (
            (p, p_A, (p_B, p_unlisted - p_B)),
            (q, q_A, (np.full_like(q_A, q_B), q_unlisted - q_A)),
        )
    ]
    values = divergence(*(torch.from_numpy(split).log() for split in splits), kind)
    assert compare(teacher, student, kind).divergences[0] <= float(values.min()) * (1 + 1e-6) + 2e-5
