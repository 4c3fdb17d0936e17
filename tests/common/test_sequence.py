from dataclasses import replace

import numpy as np
import pytest

from common.sequence import Prompt, TokenSource, TopLogprobs


@pytest.fixture
def top() -> TopLogprobs:
    probabilities = np.array([[0.5, 0.25], [0.75, 0.125]])
    return TopLogprobs(np.array([[7, 3], [2, 7]], np.int32), np.log(probabilities).astype(np.float32))


def test_a_rank_is_the_place_in_the_list_and_k_outside(top):
    assert top.rank_of(np.array([3, 9], np.int32)).tolist() == [1, 2]


def test_the_logprob_of_a_token_outside_the_list_is_nan(top):
    np.testing.assert_allclose(top.logprob_of(np.array([3, 9], np.int32)), [np.log(0.25), np.nan], rtol=1e-6)


def test_covered_mass_is_what_the_list_holds_together_and_never_above_one(top):
    np.testing.assert_allclose(top.covered_mass(), [0.75, 0.875], rtol=1e-6)
    rounded_up = TopLogprobs(top.token_ids, np.full((2, 2), np.log(0.50001), np.float32))
    assert rounded_up.covered_mass().tolist() == [1.0, 1.0]


def test_of_an_unknown_row_nothing_is_known():
    unknown = TopLogprobs.unknown(2, 3)
    assert np.isnan(unknown.covered_mass()).all()
    assert np.isnan(unknown.logprob_of(np.array([1, 2], np.int32))).all()


def test_slices_put_together_again_are_the_whole(top):
    again = TopLogprobs.concatenate([TopLogprobs.empty(2), top[:1], top[1:]])
    np.testing.assert_array_equal(again.token_ids, top.token_ids)
    np.testing.assert_array_equal(again.logprobs, top.logprobs)


def test_a_sequence_id_tells_prompt_epoch_and_sample():
    prompt = Prompt(prompt_id="q7", token_ids=np.array([1], np.int32), seed=0, epoch=2, sample_index=3)
    assert prompt.sequence_id == "q7.2.3"


def test_an_empty_prompt_is_refused_by_its_id():
    with pytest.raises(AssertionError, match="prompt q7 has no tokens"):
        Prompt(prompt_id="q7", token_ids=np.array([], np.int32), seed=0)


def test_the_switch_position_belongs_to_the_teacher(make_sequence):
    sequence = make_sequence(num_tokens=8, switches=[5])
    assert sequence.sources[5] == TokenSource.TEACHER
    assert sequence.num_teacher_tokens == 3
    assert sequence.first_switch == 5
    with pytest.raises(AssertionError, match="a switched token belongs to the teacher"):
        replace(sequence, switches=np.array([2], np.int32))


def test_switches_must_ascend(make_sequence):
    sequence = make_sequence(num_tokens=8, switches=[3, 5], guidance_tokens=1)
    with pytest.raises(AssertionError, match="switches must ascend"):
        replace(sequence, switches=sequence.switches[::-1])


def test_arrays_of_another_length_are_refused_by_name(make_sequence):
    sequence = make_sequence(num_tokens=8)
    with pytest.raises(AssertionError, match="thresholds has 7 rows for 8 tokens"):
        replace(sequence, thresholds=sequence.thresholds[:7])


def test_every_token_needs_the_teachers_distribution(make_sequence):
    sequence = make_sequence(num_tokens=8)
    with pytest.raises(AssertionError, match="every token needs the teacher's distribution"):
        replace(sequence, teacher_top=TopLogprobs.unknown(8, sequence.teacher_top.k))


def test_the_mean_divergence_is_over_proposed_positions_and_nan_without_any(make_sequence):
    sequence = make_sequence(num_tokens=8, switches=[5])
    assert sequence.mean_divergence == pytest.approx(float(sequence.divergences[:6].mean()))
    off_policy = make_sequence(switches=[0])
    assert np.isnan(off_policy.mean_divergence)
    assert make_sequence(switches=[]).first_switch is None
