import asyncio
from contextlib import aclosing

import numpy as np
import pytest

from common.config import AdaSwitch, Sampling
from common.sequence import MixedSequence, Prompt
from rollout_server.controller import SwitchingController
from rollout_server.engines.protocol import EngineCallError, ScoreRequest, WriteRequest, concatenate_written
from rollout_server.engines.replicas import ReplicatedEngine
from rollout_server.engines.scripted import Fault, HashedScript, ScriptedEngine
from tests.support.streams import sequences_of

TEACHER = HashedScript(vocabulary_size=24, seed=1, eos_probability=0.01)
STUDENT = TEACHER.student(seed=2)
PROMPTS = [
    Prompt(prompt_id=f"p{number}", token_ids=np.arange(1, 4 + number, dtype=np.int32), seed=number)
    for number in range(12)
]


def engines(count: int, script=STUDENT, faulty: dict[int, Fault] | None = None) -> list[ScriptedEngine]:
    return [
        ScriptedEngine(script, top_logprobs=8, delay=lambda: 0.0005, fault=(faulty or {}).get(number))
        for number in range(count)
    ]


def write_request(**changes) -> WriteRequest:
    fields = {"prefix": np.arange(4, dtype=np.int32), "max_tokens": 30, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    return WriteRequest(**{**fields, "chunk_tokens": 4, **changes})


async def mixed(student, teacher) -> list[MixedSequence]:
    controller = SwitchingController(
        student=student,
        teacher=teacher,
        policy=AdaSwitch(window=4),
        sampling=Sampling(max_new_tokens=40, chunk_tokens=4),
        top_logprobs=8,
        stop_token_ids=(TEACHER.eos_token_id,),
    )
    sequences = await sequences_of(controller, PROMPTS)
    return sorted(sequences, key=lambda sequence: sequence.sequence_id)


def assert_same_tokens(left: list[MixedSequence], right: list[MixedSequence]) -> None:
    for mine, theirs in zip(left, right, strict=True):
        np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(mine.sources, theirs.sources)
        np.testing.assert_array_equal(mine.divergences, theirs.divergences)


async def test_the_number_of_replicas_does_not_change_the_result() -> None:
    one = await mixed(engines(1)[0], engines(1, TEACHER)[0])
    several = await mixed(ReplicatedEngine(engines(3)), ReplicatedEngine(engines(2, TEACHER)))
    assert_same_tokens(several, one)


async def test_all_calls_of_a_sequence_go_to_one_replica_and_sequences_are_spread() -> None:
    teachers = engines(3, TEACHER)
    replicated = ReplicatedEngine(teachers)
    text = np.arange(6, dtype=np.int32)
    for _ in range(4):
        await replicated.score(ScoreRequest(token_ids=text, start=6, sequence_id="a"))
    assert sorted(engine.num_calls["score"] for engine in teachers) == [0, 0, 4]
    await asyncio.gather(
        *(replicated.score(ScoreRequest(token_ids=text, start=6, sequence_id=f"s{n}")) for n in range(9))
    )
    assert sorted(engine.num_calls["score"] for engine in teachers) == [3, 3, 7]


class BreaksOff:
    """An engine that dies in the middle of a stream."""

    async def stream(self, request):
        async with aclosing(engines(1)[0].stream(request)) as pieces:
            yield await anext(pieces)
        raise EngineCallError("student engine 0: gone")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_stream_goes_on_elsewhere_at_the_token_after_the_last_one_handed_over(temperature: float) -> None:
    request = write_request(temperature=temperature, sequence_id="a")
    whole = await engines(1)[0].generate(request)
    replicated = ReplicatedEngine([BreaksOff(), *engines(1)])  # type: ignore[list-item]  # the stream is all it needs
    pieces = [piece async for piece in replicated.stream(request)]
    assert len(pieces) > 2
    written = concatenate_written(pieces)
    np.testing.assert_array_equal(written.token_ids, whole.token_ids)
    np.testing.assert_array_equal(written.logprobs, whole.logprobs)
    assert written.finish_reason == whole.finish_reason


@pytest.mark.parametrize("eos_probability", [0.01, 0.99], ids=["another word", "an earlier end"])
async def test_a_stream_does_not_go_on_in_another_text(eos_probability: float) -> None:
    """Two replicas of one model need not round alike; what one wrote is no beginning of what the other goes on with."""
    other = HashedScript(vocabulary_size=24, seed=5, eos_probability=eos_probability)
    replicated = ReplicatedEngine([BreaksOff(), *engines(1, other)])  # type: ignore[list-item]
    stream = replicated.stream(write_request(temperature=1.0, sequence_id="a"))
    await anext(stream)
    with pytest.raises(EngineCallError, match="replica 1 generates other tokens than replica 0 did before it failed"):
        await anext(stream)


@pytest.mark.parametrize("call", ["write", "score"])
async def test_a_dead_replicas_sequences_move_to_another(call) -> None:
    expected = await mixed(engines(1)[0], engines(1, TEACHER)[0])
    fault = {0: Fault(call=call, number=3)}
    students = ReplicatedEngine(engines(2, faulty=fault if call == "write" else None))
    teachers = ReplicatedEngine(engines(2, TEACHER, faulty=fault if call == "score" else None))
    assert_same_tokens(await mixed(students, teachers), expected)


async def test_when_the_last_replica_fails_its_error_is_raised() -> None:
    faults = {number: Fault(call="score", number=1) for number in range(2)}
    replicated = ReplicatedEngine(engines(2, TEACHER, faulty=faults))
    with pytest.raises(EngineCallError, match="score 1 fails"):
        await replicated.score(ScoreRequest(token_ids=np.arange(3, dtype=np.int32), start=3, sequence_id="a"))


async def test_a_closed_stream_counts_as_load_no_longer() -> None:
    students = engines(2)
    replicated = ReplicatedEngine(students)
    async with aclosing(replicated.stream(write_request(sequence_id="a"))) as pieces:
        await anext(pieces)
    assert [engine.num_running for engine in students] == [0, 0]
    await replicated.generate(write_request(sequence_id="b"))
    assert students[0].num_calls["write"] == 2
