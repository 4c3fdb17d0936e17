from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.sequence import MixedSequence, TokenSource, TopLogprobs
from trainer.batch import MicroBatch, collate, divide, empty_micro_batch

Make = Callable[..., MixedSequence]
LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=12)


def sequences_of(make_sequence: Make, lengths: list[tuple[int, int]], k: int = 3) -> list[MixedSequence]:
    """Sequences of (P, T) tokens; every token id and every teacher id is different from all others."""
    counter = iter(range(1, 100_000))

    def fresh(*shape: int) -> np.ndarray:
        return np.array([next(counter) for _ in range(int(np.prod(shape)))], np.int32).reshape(shape)

    return [
        make_sequence(
            fresh(num_prompt_tokens),
            fresh(num_tokens),
            TopLogprobs(fresh(num_tokens, k), -fresh(num_tokens, k).astype(np.float32)),
            name=str(number),
            num_student_tokens=num_tokens // 2,
        )
        for number, (num_prompt_tokens, num_tokens) in enumerate(lengths)
    ]


def make_micro_batches(
    sequences: list[MixedSequence], tokens_per_micro_batch: int, *, packed: bool = False
) -> list[MicroBatch]:
    (groups,) = divide(sequences, 1, tokens_per_micro_batch, packed=packed)
    return [collate(group, packed=packed) for group in groups]


@given(LENGTHS, st.integers(1, 60))
def test_every_sequence_is_in_exactly_one_micro_batch_within_the_budget(
    make_sequence: Make, lengths: list[tuple[int, int]], budget: int
) -> None:
    sequences = sequences_of(make_sequence, lengths)
    micro_batches = make_micro_batches(sequences, budget)
    placed = Counter(sequence_id for micro_batch in micro_batches for sequence_id in micro_batch.sequence_ids)
    assert placed == Counter(sequence.sequence_id for sequence in sequences)
    for micro_batch in micro_batches:
        assert micro_batch.input_ids.numel() <= budget or len(micro_batch.sequence_ids) == 1


@given(LENGTHS, st.integers(1, 60), st.randoms())
def test_the_order_of_the_sequences_changes_nothing(
    make_sequence: Make, lengths: list[tuple[int, int]], budget: int, random: object
) -> None:
    sequences = sequences_of(make_sequence, lengths)
    shuffled = sorted(sequences, key=lambda _: random.random())  # type: ignore[attr-defined]
    pairs = zip(make_micro_batches(sequences, budget), make_micro_batches(shuffled, budget), strict=True)
    assert all(torch.equal(left.input_ids, right.input_ids) for left, right in pairs)


@given(LENGTHS, st.booleans())
def test_each_token_stands_with_its_own_row_and_behind_the_state_that_predicts_it(
    make_sequence: Make, lengths: list[tuple[int, int]], packed: bool
) -> None:
    sequences = sequences_of(make_sequence, lengths)
    micro_batch = collate(sequences, packed=packed)
    flat_ids = micro_batch.input_ids.flatten()
    # The token that comes right after the predicting state is the predicted one, and never padding.
    assert torch.equal(flat_ids[micro_batch.hidden_rows + 1], micro_batch.token_ids)
    token = 0
    for sequence in sequences:
        for t in range(len(sequence)):
            before = sequence.prompt.token_ids[-1] if t == 0 else sequence.token_ids[t - 1]
            assert flat_ids[micro_batch.hidden_rows[token]] == before
            assert micro_batch.token_ids[token] == sequence.token_ids[t]
            assert micro_batch.sources[token] == sequence.sources[t]
            assert micro_batch.teacher_ids[token].tolist() == sequence.teacher_top.token_ids[t].tolist()
            assert micro_batch.teacher_logprobs[token].tolist() == sequence.teacher_top.logprobs[t].tolist()
            assert micro_batch.sequence_id_of(token) == sequence.sequence_id
            token += 1
    assert token == len(micro_batch)


@given(LENGTHS)
def test_padding_is_on_the_right_and_masked(make_sequence: Make, lengths: list[tuple[int, int]]) -> None:
    sequences = sequences_of(make_sequence, lengths)
    micro_batch = collate(sequences)
    for row, (num_prompt_tokens, num_tokens) in enumerate(lengths):
        length = num_prompt_tokens + num_tokens
        assert micro_batch.attention_mask[row].tolist() == [1] * length + [0] * (
            micro_batch.input_ids.shape[1] - length
        )
        assert (micro_batch.input_ids[row, length:] == 0).all()


@given(LENGTHS, st.integers(1, 60))
def test_packed_sequences_leave_nothing_empty_and_each_begins_at_position_0(
    make_sequence: Make, lengths: list[tuple[int, int]], budget: int
) -> None:
    micro_batches = make_micro_batches(sequences_of(make_sequence, lengths), budget, packed=True)
    placed = Counter(sequence_id for micro_batch in micro_batches for sequence_id in micro_batch.sequence_ids)
    assert placed == Counter(f"{number}.0.0" for number in range(len(lengths)))
    for micro_batch in micro_batches:
        assert micro_batch.attention_mask is None
        of_each = [sum(lengths[int(sequence_id.split(".")[0])]) for sequence_id in micro_batch.sequence_ids]
        assert micro_batch.position_ids[0].tolist() == [i for length in of_each for i in range(length)]
        assert micro_batch.input_ids.numel() <= budget or len(of_each) == 1


@given(LENGTHS, st.integers(1, 60), st.integers(1, 5), st.booleans())
def test_ranks_share_all_sequences_get_as_many_micro_batches_and_alike_many_tokens(
    make_sequence: Make, lengths: list[tuple[int, int]], budget: int, num_ranks: int, packed: bool
) -> None:
    sequences = sequences_of(make_sequence, lengths)
    division = divide(sequences, num_ranks, budget, packed=packed)
    assert len(division) == num_ranks
    assert len({len(groups) for groups in division}) == 1
    placed = Counter(sequence.sequence_id for groups in division for group in groups for sequence in group)
    assert placed == Counter(sequence.sequence_id for sequence in sequences)
    loads = [sum(s.prompt.token_ids.size + len(s) for group in groups for s in group) for groups in division]
    assert max(loads) - min(loads) <= max(map(sum, lengths))
    assert any(all(groups) for groups in division)  # no micro-batch that is empty everywhere


@given(LENGTHS, st.randoms())
def test_every_rank_finds_the_same_division_whatever_the_order(
    make_sequence: Make, lengths: list[tuple[int, int]], random: object
) -> None:
    sequences = sequences_of(make_sequence, lengths)
    shuffled = sorted(sequences, key=lambda _: random.random())  # type: ignore[attr-defined]
    names = [
        [[[s.sequence_id for s in group] for group in groups] for groups in divide(order, 3, 30, packed=False)]
        for order in (sequences, shuffled)
    ]
    assert names[0] == names[1]


def test_an_empty_micro_batch_has_no_new_token_and_one_to_compute_on() -> None:
    micro_batch = empty_micro_batch(k=3)
    assert len(micro_batch) == 0
    assert micro_batch.input_ids.shape == (1, 1)
    assert micro_batch.teacher_ids.shape == (0, 3)


def test_the_longest_come_first_so_that_alike_lengths_share_a_micro_batch(make_sequence: Make) -> None:
    sequences = sequences_of(make_sequence, [(1, 1), (10, 10), (1, 2), (10, 9)])
    micro_batches = make_micro_batches(sequences, 40)
    assert [micro_batch.sequence_ids for micro_batch in micro_batches] == [("1.0.0", "3.0.0"), ("2.0.0", "0.0.0")]


def test_a_sequence_longer_than_the_budget_is_alone(make_sequence: Make) -> None:
    micro_batches = make_micro_batches(sequences_of(make_sequence, [(2, 2), (20, 20), (2, 1)]), 8)
    assert [micro_batch.sequence_ids for micro_batch in micro_batches] == [("1.0.0",), ("0.0.0", "2.0.0")]


def test_lists_of_different_lengths_are_not_mixed(make_sequence: Make) -> None:
    sequences = sequences_of(make_sequence, [(1, 2)], k=2) + sequences_of(make_sequence, [(1, 2)], k=3)
    with pytest.raises(AssertionError, match=r"k = \[2, 3\]"):
        collate(sequences)


def test_no_sequences_make_no_micro_batches() -> None:
    assert make_micro_batches([], 8) == []


def test_dtypes_are_what_torch_indexes_with(make_sequence: Make) -> None:
    micro_batch = collate(sequences_of(make_sequence, [(2, 4)]))
    assert micro_batch.input_ids.dtype == micro_batch.hidden_rows.dtype == micro_batch.teacher_ids.dtype == torch.int64
    assert micro_batch.teacher_logprobs.dtype == torch.float32
    assert micro_batch.sources.tolist() == [TokenSource.STUDENT] * 2 + [TokenSource.TEACHER] * 2
