import asyncio

import numpy as np
import pytest

from common.sequence import FinishReason, Ids, TopLogprobs
from rollout_server.engines.protocol import ScoreRequest, Written
from rollout_server.engines.scripted import Fault, HashedScript, ScriptedEngine, ScriptedError
from rollout_server.verifier import TeacherScores

SCRIPT = HashedScript(vocabulary_size=32, seed=1)
TEXT = np.array([5, 6, 7], np.int32)
PROPOSED = np.array([9, 8, 7, 6, 5, 4], np.int32)
K = 4


def proposal(token_ids: Ids, finish_reason: FinishReason | None = None) -> Written:
    return Written(
        token_ids=token_ids,
        logprobs=np.zeros(token_ids.size, np.float32),
        top=TopLogprobs.unknown(token_ids.size, K),
        weight_version=0,
        finish_reason=finish_reason,
    )


async def read(teacher: ScriptedEngine, lengths: list[int], finish_reason: FinishReason = "length") -> TopLogprobs:
    """The rows of PROPOSED, asked for in pieces of these lengths."""
    reading = TeacherScores(teacher, TEXT)
    ends = np.cumsum(lengths).tolist()
    rows = [
        await reading.of(
            proposal(PROPOSED[end - length : end], finish_reason if end == ends[-1] else None), is_last=end == ends[-1]
        )
        for length, end in zip(lengths, ends, strict=True)
    ]
    await reading.close()
    return TopLogprobs.concatenate(rows)


@pytest.mark.parametrize("lengths", [[6], [1] * 6, [5, 1], [1, 5], [2, 3, 1]])
async def test_the_rows_are_those_of_the_proposed_positions_and_each_is_read_once(lengths: list[int]) -> None:
    teacher = ScriptedEngine(SCRIPT, top_logprobs=K)
    rows = await read(teacher, lengths)
    whole = np.concatenate([TEXT, PROPOSED[:-1]])
    expected = await ScriptedEngine(SCRIPT, top_logprobs=K).score(ScoreRequest(token_ids=whole, start=TEXT.size))
    np.testing.assert_array_equal(rows.token_ids, expected.token_ids)
    np.testing.assert_array_equal(rows.logprobs, expected.logprobs)
    assert teacher.num_scored_rows == PROPOSED.size


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
@pytest.mark.parametrize("lengths", [[6], [1] * 6, [5, 1]])
async def test_no_row_past_the_last_token_is_asked_for(lengths: list[int], finish_reason: FinishReason) -> None:
    teacher = ScriptedEngine(SCRIPT, top_logprobs=K, max_model_len=TEXT.size + PROPOSED.size)
    assert len(await read(teacher, lengths, finish_reason)) == PROPOSED.size


async def test_the_text_is_read_while_the_student_writes_its_first_tokens() -> None:
    teacher = ScriptedEngine(SCRIPT, top_logprobs=K)
    reading = TeacherScores(teacher, TEXT)
    while teacher.num_running or not teacher.num_calls["score"]:
        await asyncio.sleep(0)
    assert teacher.num_scored_rows == 1
    await reading.close()


async def test_closing_ends_a_read_that_is_under_way() -> None:
    teacher = ScriptedEngine(SCRIPT, top_logprobs=K, fault=Fault(call="score", number=1, hangs=True))
    reading = TeacherScores(teacher, TEXT)
    while not teacher.num_running:
        await asyncio.sleep(0)
    await reading.close()
    assert teacher.num_running == 0


@pytest.mark.parametrize("number", [1, 2])
async def test_a_read_that_fails_fails_where_its_rows_are_needed(number: int) -> None:
    teacher = ScriptedEngine(SCRIPT, top_logprobs=K, fault=Fault(call="score", number=number))
    reading = TeacherScores(teacher, TEXT)
    with pytest.raises(ScriptedError, match=f"score {number} fails"):
        await reading.of(proposal(PROPOSED), is_last=True)
    await reading.close()


async def test_a_failed_read_that_nobody_needed_is_no_failure() -> None:
    teacher = ScriptedEngine(SCRIPT, top_logprobs=K, fault=Fault(call="score", number=1))
    reading = TeacherScores(teacher, TEXT)
    await asyncio.sleep(0.01)
    await reading.close()
