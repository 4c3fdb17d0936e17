import numpy as np
import pytest

from common.sequence import Prompt, TokenSource, TopLogprobs
from rollout_server.engines.protocol import Written
from rollout_server.sequence_builder import Judged, SequenceBuilder

K = 2
PROMPT = Prompt(prompt_id="p0", token_ids=np.array([7, 8], np.int32), seed=0)


def top(*best: int) -> TopLogprobs:
    """Rows that list a given id at -0.1 nats and the one after it at -3."""
    token_ids = np.array([[token_id, token_id + 1] for token_id in best], np.int32)
    return TopLogprobs(token_ids, np.tile(np.float32([-0.1, -3.0]), (len(best), 1)))


def judged(*token_ids: int, teacher_best: tuple[int, ...], weight_version: int = 4) -> Judged:
    ids = np.array(token_ids, np.int32)
    return Judged(
        token_ids=ids,
        student_logprobs=np.full(ids.size, -0.1, np.float32),
        student_top=top(*token_ids),
        teacher_top=top(*teacher_best),
        divergences=np.arange(ids.size, dtype=np.float32) + 0.5,
        thresholds=np.arange(ids.size, dtype=np.float32) + 0.25,
        student_ranks=top(*teacher_best).rank_of(ids),
        weight_version=weight_version,
    )


def written(*token_ids: int) -> Written:
    return Written(
        token_ids=np.array(token_ids, np.int32),
        logprobs=np.full(len(token_ids), -0.1, np.float32),
        top=top(*token_ids),
        weight_version=0,
        finish_reason="length",
    )


def test_it_starts_with_the_prompt_and_nothing_known() -> None:
    builder = SequenceBuilder(PROMPT, K, max_new_tokens=40)
    assert builder.text.tolist() == [7, 8]
    assert len(builder) == builder.divergences.size == builder.student_ranks.size == 0


def test_kept_tokens_are_the_students_with_what_the_teacher_thinks_of_them() -> None:
    builder = SequenceBuilder(PROMPT, K, max_new_tokens=40, finish_reason="stop")
    builder.keep(judged(1, 2, 3, teacher_best=(1, 1, 5)))
    sequence = builder.seal("adaswitch")
    assert sequence.token_ids.tolist() == [1, 2, 3]
    assert (sequence.sources == TokenSource.STUDENT).all()
    assert sequence.student_ranks.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(sequence.teacher_logprobs, np.float32([-0.1, -3.0, np.nan]))
    np.testing.assert_array_equal(sequence.student_logprobs, np.float32([-0.1] * 3))
    assert sequence.weight_versions.tolist() == [4, 4, 4]
    assert sequence.first_switch is None


def test_taken_tokens_are_the_teachers_and_the_first_carries_what_was_refused() -> None:
    builder = SequenceBuilder(PROMPT, K, max_new_tokens=40, finish_reason="length")
    builder.keep(judged(1, 2, teacher_best=(1, 2)))
    builder.take(written(5, 6), judged(3, teacher_best=(5,)))
    sequence = builder.seal("adaswitch")
    assert sequence.token_ids.tolist() == [1, 2, 5, 6]
    assert sequence.sources.tolist() == [TokenSource.STUDENT] * 2 + [TokenSource.TEACHER] * 2
    assert sequence.switches.tolist() == [2]
    np.testing.assert_array_equal(sequence.divergences, np.float32([0.5, 1.5, 0.5, np.nan]))
    np.testing.assert_array_equal(sequence.thresholds, np.float32([0.25, 1.25, 0.25, np.nan]))
    assert sequence.student_ranks.tolist() == [0, 0, 2, -1]
    assert sequence.weight_versions.tolist() == [4, 4, 4, -1]
    assert sequence.student_top.token_ids.tolist() == [[1, 2], [2, 3], [3, 4], [-1, -1]]
    assert sequence.teacher_top.token_ids[:, 0].tolist() == [1, 2, 5, 6]
    np.testing.assert_array_equal(sequence.student_logprobs, np.float32([-0.1, -0.1, np.nan, np.nan]))
    np.testing.assert_array_equal(sequence.teacher_logprobs, np.float32([-0.1] * 4))


def test_tokens_taken_without_a_proposal_know_nothing_of_the_student() -> None:
    builder = SequenceBuilder(PROMPT, K, max_new_tokens=40, finish_reason="stop")
    builder.take(written(5, 6), None)
    sequence = builder.seal("off_policy")
    assert sequence.switches.tolist() == [0]
    assert np.isnan(sequence.divergences).all()
    assert np.isnan(sequence.student_top.logprobs).all()
    assert (sequence.weight_versions == -1).all()


def test_the_text_and_the_history_grow_with_both() -> None:
    builder = SequenceBuilder(PROMPT, K, max_new_tokens=40)
    builder.keep(judged(1, teacher_best=(1,)))
    builder.take(written(5, 6), judged(2, teacher_best=(5,)))
    builder.keep(judged(3, teacher_best=(4,)))
    assert len(builder) == 4
    assert builder.text.tolist() == [7, 8, 1, 5, 6, 3]
    np.testing.assert_array_equal(builder.divergences, np.float32([0.5, 0.5, np.nan, 0.5]))
    assert builder.student_ranks.tolist() == [0, 2, -1, 2]
    assert builder.num_switches == 1


def test_a_part_of_judged_tokens_keeps_all_columns_aligned() -> None:
    whole = judged(1, 2, 3, teacher_best=(1, 2, 9))
    part = whole[1:3]
    assert len(part) == 2
    assert part.token_ids.tolist() == [2, 3]
    assert part.divergences.tolist() == [1.5, 2.5]
    assert part.teacher_top.token_ids[:, 0].tolist() == [2, 9]
    assert part.weight_version == 4


def test_an_unfinished_builder_is_not_sealed() -> None:
    with pytest.raises(AssertionError, match=r"p0\.0\.0 is not finished"):
        SequenceBuilder(PROMPT, K, max_new_tokens=40).seal("adaswitch")
