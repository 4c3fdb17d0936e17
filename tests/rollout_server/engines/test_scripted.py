import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np
import pytest

from common.sequence import Floats, Ids
from common.weights import WeightUpdate
from rollout_server.engines.protocol import ScoreRequest, WriteRequest, Written, concatenate_written
from rollout_server.engines.scripted import Fault, HashedScript, ScriptedEngine, ScriptedError

TEACHER = HashedScript(vocabulary_size=32, seed=1)
ENDLESS = replace(TEACHER, eos_probability=1e-9)
PREFIX = np.array([5, 6, 7], np.int32)
REQUEST = WriteRequest(prefix=PREFIX, max_tokens=40, temperature=1.0, top_p=1.0, seed=11, chunk_tokens=8)


@dataclass(frozen=True)
class Coin:
    """The same four probabilities after every text."""

    probabilities: tuple[float, ...] = (0.1, 0.5, 0.3, 0.1)
    eos_token_id: int | None = None

    def next_logprobs(self, text: Ids) -> Floats:
        return np.log(self.probabilities).astype(np.float32)


async def take(stream: AsyncGenerator[Written, None], num_pieces: int) -> list[Written]:
    return [await anext(stream) for _ in range(num_pieces)]


async def test_a_greedy_text_holds_the_most_probable_tokens() -> None:
    written = await ScriptedEngine(ENDLESS, top_logprobs=4).generate(replace(REQUEST, temperature=0.0))
    text = PREFIX
    for token_id, logprob in zip(written.token_ids, written.logprobs, strict=True):
        row = ENDLESS.next_logprobs(text)
        assert (token_id, logprob) == (row.argmax(), row.max())
        text = np.append(text, token_id)
    assert len(written) == 40


@pytest.mark.parametrize("chunk_tokens", [1, 3, 40])
async def test_the_same_request_gives_the_same_tokens_in_chunks_of_any_size(chunk_tokens: int) -> None:
    engine = ScriptedEngine(ENDLESS, top_logprobs=4)
    whole = await engine.generate(REQUEST)
    again = await engine.generate(replace(REQUEST, chunk_tokens=chunk_tokens))
    other = await engine.generate(replace(REQUEST, seed=12))
    np.testing.assert_array_equal(again.token_ids, whole.token_ids)
    np.testing.assert_array_equal(again.top.logprobs, whole.top.logprobs)
    assert other.token_ids.tolist() != whole.token_ids.tolist()


async def test_rows_are_raw_and_best_first_whatever_the_sampling() -> None:
    engine = ScriptedEngine(Coin(), top_logprobs=3)
    written = await engine.generate(replace(REQUEST, temperature=2.0, top_p=0.5))
    assert written.top.token_ids[0].tolist() == [1, 2, 0]  # equal ones by id
    np.testing.assert_allclose(np.exp(written.top.logprobs[0]), [0.5, 0.3, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(written.logprobs, np.log(np.float32([0.1, 0.5, 0.3, 0.1]))[written.token_ids])


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.1, 0.5, 0.3, 0.1]),
        (1.0, 0.8, [0.0, 0.625, 0.375, 0.0]),
        (1.0, 0.4, [0.0, 1.0, 0.0, 0.0]),
        (0.5, 1.0, np.square([0.1, 0.5, 0.3, 0.1]) / 0.36),
    ],
)
async def test_tokens_are_drawn_as_temperature_and_top_p_say(
    temperature: float, top_p: float, expected: list[float]
) -> None:
    engine = ScriptedEngine(Coin(), top_logprobs=1)
    request = replace(REQUEST, temperature=temperature, top_p=top_p, max_tokens=4000, chunk_tokens=4000)
    token_ids = (await engine.generate(request)).token_ids
    np.testing.assert_allclose(np.bincount(token_ids, minlength=4) / 4000, expected, atol=0.03)


async def test_a_text_ends_at_its_limit_a_stop_token_or_the_end_of_sequence() -> None:
    free = ScriptedEngine(Coin(), top_logprobs=1)
    written = await free.generate(REQUEST)
    assert (len(written), written.finish_reason) == (40, "length")

    stopped = await free.generate(replace(REQUEST, stop_token_ids=(2, 3)))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids[-1] in (2, 3)
    assert not np.isin(stopped.token_ids[:-1], (2, 3)).any()

    ended = await ScriptedEngine(Coin(eos_token_id=2), top_logprobs=1).generate(REQUEST)
    assert ended.token_ids.tolist() == written.token_ids[: len(ended)].tolist()
    assert (ended.token_ids[-1], ended.finish_reason) == (2, "stop")


async def test_the_engine_writes_on_while_nobody_takes_what_it_wrote() -> None:
    engine = ScriptedEngine(ENDLESS, top_logprobs=4)
    async with aclosing(engine.stream(replace(REQUEST, chunk_tokens=4))) as stream:
        first = await anext(stream)
        while engine.num_written_tokens < 40:
            await asyncio.sleep(0)
        rest = await anext(stream)
    assert len(first) < 40
    assert len(first) + len(rest) == 40
    whole = await engine.generate(REQUEST)
    np.testing.assert_array_equal(concatenate_written([first, rest]).token_ids, whole.token_ids)


async def test_closing_a_stream_ends_its_writing() -> None:
    engine = ScriptedEngine(ENDLESS, top_logprobs=4, delay=lambda: 0.001)
    stream = engine.stream(replace(REQUEST, max_tokens=10_000, chunk_tokens=1))
    taken = await take(stream, 2)
    await asyncio.sleep(0.01)
    assert engine.num_running == 1
    await stream.aclose()
    num_written = engine.num_written_tokens
    await asyncio.sleep(0.01)
    assert engine.num_running == 0
    assert engine.num_written_tokens == num_written < 10_000
    assert engine.num_untaken_tokens == num_written - sum(map(len, taken))


async def test_what_is_read_is_what_was_written() -> None:
    engine = ScriptedEngine(TEACHER, top_logprobs=5)
    written = await engine.generate(REQUEST)
    text = np.concatenate([PREFIX, written.token_ids[:-1]])
    rows = await engine.score(ScoreRequest(token_ids=text, start=PREFIX.size))
    np.testing.assert_array_equal(rows.token_ids, written.top.token_ids)
    np.testing.assert_array_equal(rows.logprobs, written.top.logprobs)
    assert engine.num_scored_rows == len(written)


async def test_no_more_rows_are_listed_than_the_vocabulary_holds() -> None:
    assert (await ScriptedEngine(Coin(), top_logprobs=99).generate(REQUEST)).top.k == 4


async def test_requests_beyond_the_context_are_refused() -> None:
    engine = ScriptedEngine(TEACHER, top_logprobs=4, max_model_len=10)
    await engine.generate(replace(REQUEST, max_tokens=7))
    await engine.score(ScoreRequest(token_ids=np.arange(9, dtype=np.int32), start=1))
    with pytest.raises(ValueError, match="write needs 11 tokens, the context length is 10"):
        await engine.generate(replace(REQUEST, max_tokens=8))
    with pytest.raises(ValueError, match="score needs 11 tokens, the context length is 10"):
        await engine.score(ScoreRequest(token_ids=np.arange(10, dtype=np.int32), start=10))


async def test_the_call_that_was_chosen_fails_and_no_other() -> None:
    engine = ScriptedEngine(TEACHER, top_logprobs=4, fault=Fault(call="write", number=2))
    calls = (engine.generate(REQUEST) for _ in range(3))
    first, second, third = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(second, ScriptedError)
    assert str(second) == "write 2 fails as scripted"
    assert isinstance(first, Written)
    assert isinstance(third, Written)
    assert engine.num_running == 0


@pytest.mark.parametrize("call", ["write", "score"])
async def test_a_call_that_hangs_ends_when_it_is_cancelled(call: str) -> None:
    engine = ScriptedEngine(TEACHER, top_logprobs=4, fault=Fault(call=call, number=1, hangs=True))
    asked = engine.generate(REQUEST) if call == "write" else engine.score(ScoreRequest(token_ids=PREFIX, start=1))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asked, 0.02)
    assert engine.num_running == 0


async def test_new_weights_are_another_script_and_another_version() -> None:
    versions = {1: replace(TEACHER, seed=2)}
    engine = ScriptedEngine(TEACHER, top_logprobs=4, script_of=lambda update: versions[update.version])
    before = await engine.generate(REQUEST)
    await engine.load_weights(WeightUpdate(version=1))
    after = await engine.generate(REQUEST)
    assert (before.weight_version, after.weight_version) == (0, 1)
    expected = await ScriptedEngine(versions[1], top_logprobs=4).generate(REQUEST)
    np.testing.assert_array_equal(after.token_ids, expected.token_ids)


def test_every_row_of_a_script_is_a_distribution() -> None:
    for script in (TEACHER, TEACHER.student(seed=2)):
        for last in range(20):
            row = script.next_logprobs(np.array([last], np.int32))
            assert np.exp(row.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-6)
            assert np.exp(row[0]) == pytest.approx(0.03, abs=1e-6)


def test_a_students_script_differs_from_its_teachers_in_spikes() -> None:
    student = TEACHER.student(seed=2, spike_rate=0.2)
    texts = [np.array([a, b], np.int32) for a in range(1, 31) for b in range(1, 31)]
    nats = [
        float((np.exp(p) * (p - q)).sum())
        for p, q in ((TEACHER.next_logprobs(text), student.next_logprobs(text)) for text in texts)
    ]
    assert np.median(nats) < 0.02
    assert np.mean(np.array(nats) > 0.3) == pytest.approx(0.2, abs=0.05)
