"""Given answers as sequences, over scripted engines."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from common.config import Dataset, Mixture, OffPolicy, Policy, Sampling
from common.sequence import MixedSequence, Prompt, TokenSource
from rollout_server.controller import SwitchingController
from rollout_server.engines.scripted import HashedScript, ScriptedEngine
from rollout_server.traces.schema import TOKENS_FILE
from rollout_server.traces.writer import TraceWriter
from tests.support.streams import sequences_of
from tests.support.trace_reader import TraceReader

K = 8
TEACHER = HashedScript(vocabulary_size=24, seed=1, eos_probability=0.1)
PROMPTS = [
    Prompt(prompt_id=f"p{number}", token_ids=np.arange(1 + number, 4 + 2 * number, dtype=np.int32), seed=number)
    for number in range(8)
]


async def collect(
    policy: Policy, prompts: Sequence[Prompt], student: ScriptedEngine | None = None
) -> list[MixedSequence]:
    controller = SwitchingController(
        student=student or ScriptedEngine(TEACHER.student(seed=2), top_logprobs=K),
        teacher=ScriptedEngine(TEACHER, top_logprobs=K),
        policy=policy,
        sampling=Sampling(temperature=0.0, max_new_tokens=40, chunk_tokens=8),
        top_logprobs=K,
        stop_token_ids=(TEACHER.eos_token_id,),
    )
    sequences = await sequences_of(controller, prompts)
    return sorted(sequences, key=lambda sequence: sequence.sequence_id)


def answered(sequences: Sequence[MixedSequence]) -> list[Prompt]:
    """The prompts with what was written for them as their given answers."""
    return [replace(sequence.prompt, answer_token_ids=sequence.token_ids) for sequence in sequences]


async def test_the_teachers_own_answers_read_are_the_off_policy_sequences() -> None:
    written = await collect(OffPolicy(), PROMPTS)
    student = ScriptedEngine(TEACHER.student(seed=2), top_logprobs=K)
    read = await collect(Dataset(), answered(written), student)
    for given, off_policy in zip(read, written, strict=True):
        np.testing.assert_array_equal(given.token_ids, off_policy.token_ids)
        np.testing.assert_array_equal(given.teacher_logprobs, off_policy.teacher_logprobs)
        np.testing.assert_array_equal(given.teacher_top.token_ids, off_policy.teacher_top.token_ids)
        np.testing.assert_array_equal(given.teacher_top.logprobs, off_policy.teacher_top.logprobs)
    assert student.num_calls == {"write": 0, "score": 0}


async def test_nobody_wrote_a_given_answer() -> None:
    (sequence,) = await collect(Dataset(), [replace(PROMPTS[0], answer_token_ids=np.array([3, 5, 1], np.int32))])
    assert (sequence.sources == TokenSource.DATASET).all()
    assert (sequence.num_student_tokens, sequence.num_teacher_tokens, sequence.first_switch) == (0, 0, None)
    assert (sequence.weight_versions == -1).all()
    assert np.isnan(sequence.divergences).all()
    assert sequence.finish_reason == "stop"


async def test_an_answer_of_one_token_is_read() -> None:
    (sequence,) = await collect(Dataset(), [replace(PROMPTS[0], answer_token_ids=np.array([1], np.int32))])
    assert len(sequence.teacher_top) == 1


async def test_a_mixture_takes_the_given_answers_it_would_else_have_the_teacher_write() -> None:
    written = await collect(Mixture(student_share=0.5), PROMPTS)
    mixed = await collect(Mixture(student_share=0.5, rest="dataset"), answered(await collect(OffPolicy(), PROMPTS)))
    for given, other in zip(mixed, written, strict=True):
        np.testing.assert_array_equal(given.token_ids, other.token_ids)
        expected = TokenSource.DATASET if other.num_teacher_tokens else TokenSource.STUDENT
        assert (given.sources == expected).all()
    assert {int(sequence.sources[0]) for sequence in mixed} == {TokenSource.STUDENT, TokenSource.DATASET}


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_a_prompt_without_an_answer_is_named_only_where_it_is_taken(share: float) -> None:
    policy = Mixture(student_share=share, rest="dataset")
    if share == 1.0:
        assert len(await collect(policy, PROMPTS)) == len(PROMPTS)
    else:
        with pytest.raises(RuntimeError, match=r"prompt p\d\.0\.0: .*has no answer tokens"):
            await collect(policy, PROMPTS)


async def test_the_trace_keeps_who_wrote_it(tmp_path) -> None:
    (sequence,) = await collect(Dataset(), [replace(PROMPTS[0], answer_token_ids=np.array([3, 5, 1], np.int32))])
    writer = TraceWriter(tmp_path, decode=str, token_texts=lambda ids: [f"t{token_id}" for token_id in ids])
    segment = writer.write_segment(1, [sequence])
    assert pq.read_table(segment / TOKENS_FILE).to_pydict()["source"] == ["dataset"] * 3
    with TraceReader(tmp_path) as reader:
        trace = reader.sequence(sequence.sequence_id)
        assert trace is not None
        assert [token.source for token in trace.tokens] == ["dataset"] * 3
        assert (trace.sequence.num_student_tokens, trace.sequence.num_teacher_tokens) == (0, 0)
        assert reader.steps()[0].teacher_share == 0.0
