import asyncio
import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.sequence import TopLogprobs
from rollout_server.engine import ScoreRequest, WriteRequest, Written, concatenate_written
from rollout_server.engines.multiplex import ReadBatch, StreamMultiplexer, WrittenBatch
from rollout_server.engines.scripted import Fault, HashedScript, ScriptedEngine

SCRIPT = HashedScript(vocabulary_size=32, seed=1, eos_probability=0.01)
K = 4
REQUEST = WriteRequest(
    prefix=np.array([5, 6, 7], np.int32), max_tokens=30, temperature=1.0, top_p=1.0, seed=0, chunk_tokens=4
)
ENDLESS = replace(REQUEST, max_tokens=100_000, chunk_tokens=1)


@st.composite
def pieces(draw: st.DrawFn, k: int) -> Written:
    num_tokens = draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return Written(
        token_ids=rng.integers(0, 32, num_tokens).astype(np.int32),
        logprobs=rng.normal(size=num_tokens).astype(np.float32),
        top=TopLogprobs(
            rng.integers(0, 32, (num_tokens, k)).astype(np.int32), rng.normal(size=(num_tokens, k)).astype(np.float32)
        ),
        weight_version=draw(st.integers(0, 9)),
        finish_reason=draw(st.sampled_from([None, "stop", "length"])),
    )


@given(st.integers(1, 4).flatmap(lambda k: st.lists(st.tuples(st.integers(0, 2**40), pieces(k)), max_size=6)))
def test_what_is_packed_is_unpacked(moved: list[tuple[int, Written]]) -> None:
    unpacked = list(WrittenBatch.pack(moved, {}).unpack())
    assert [stream_id for stream_id, _ in unpacked] == [stream_id for stream_id, _ in moved]
    for (_, mine), (_, theirs) in zip(unpacked, moved, strict=True):
        np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(mine.logprobs, theirs.logprobs)
        np.testing.assert_array_equal(mine.top.token_ids, theirs.top.token_ids)
        np.testing.assert_array_equal(mine.top.logprobs, theirs.top.logprobs)
        assert (mine.weight_version, mine.finish_reason) == (theirs.weight_version, theirs.finish_reason)


async def test_scores_come_back_as_they_were_asked_for() -> None:
    engine = ScriptedEngine(SCRIPT, top_logprobs=K)
    requests = [
        ScoreRequest(token_ids=np.arange(n, n + 6, dtype=np.int32)[: 3 + n], start=start, sequence_id=str(n))
        for n, start in enumerate((1, 4, 2))
    ]
    rows = (await StreamMultiplexer(engine).score(ReadBatch.pack(requests))).unpack()
    for mine, request in zip(rows, requests, strict=True):
        theirs = await engine.score(request)
        assert isinstance(mine, TopLogprobs)
        np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(mine.logprobs, theirs.logprobs)


async def drain(streams: StreamMultiplexer, client_id: str, num_streams: int) -> dict[int, Written]:
    """What each stream of a client wrote, once all have ended."""
    parts: dict[int, list[Written]] = {}
    ended = 0
    while ended < num_streams:
        for stream_id, written in (await streams.poll(client_id, 5.0)).unpack():
            parts.setdefault(stream_id, []).append(written)
            ended += written.finish_reason is not None
    return {stream_id: concatenate_written(written) for stream_id, written in parts.items()}


async def test_many_streams_arrive_whole_and_in_few_messages() -> None:
    engine = ScriptedEngine(SCRIPT, top_logprobs=K)
    streams = StreamMultiplexer(engine)
    requests = {number: replace(REQUEST, seed=number) for number in range(20)}
    streams.open("client", requests)
    written = await drain(streams, "client", len(requests))
    for stream_id, request in requests.items():
        expected = await engine.generate(request)
        np.testing.assert_array_equal(written[stream_id].token_ids, expected.token_ids)
        np.testing.assert_array_equal(written[stream_id].top.logprobs, expected.top.logprobs)
    assert engine.num_running == 0


async def test_two_clients_may_choose_the_same_ids() -> None:
    engine = ScriptedEngine(SCRIPT, top_logprobs=K)
    streams = StreamMultiplexer(engine)
    streams.open("a", {0: REQUEST})
    streams.open("b", {0: replace(REQUEST, seed=1)})
    a, b = await asyncio.gather(drain(streams, "a", 1), drain(streams, "b", 1))
    np.testing.assert_array_equal(a[0].token_ids, (await engine.generate(REQUEST)).token_ids)
    np.testing.assert_array_equal(b[0].token_ids, (await engine.generate(replace(REQUEST, seed=1))).token_ids)
    assert a[0].token_ids.tolist() != b[0].token_ids.tolist()


async def test_closing_ends_the_streams_named_and_forgets_what_they_wrote() -> None:
    engine = ScriptedEngine(replace(SCRIPT, eos_probability=1e-9), top_logprobs=K, delay=lambda: 0.001)
    streams = StreamMultiplexer(engine)
    streams.open("client", {0: ENDLESS, 1: ENDLESS, 2: ENDLESS})
    await asyncio.sleep(0.02)
    await streams.close("client", [0, 2])
    assert engine.num_running == 1
    batch = await streams.poll("client", 1.0)
    assert set(batch.stream_ids.tolist()) == {1}
    await streams.close("client", [1])
    assert engine.num_running == 0


async def test_a_stream_may_be_closed_before_it_began_or_after_it_ended() -> None:
    engine = ScriptedEngine(SCRIPT, top_logprobs=K)
    streams = StreamMultiplexer(engine)
    streams.open("client", {0: REQUEST})
    await streams.close("client", [0])
    assert engine.num_calls["write"] == 0
    streams.open("client", {1: REQUEST})
    await drain(streams, "client", 1)
    await streams.close("client", [1, 77])


async def test_a_failed_stream_is_reported_and_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    streams = StreamMultiplexer(ScriptedEngine(SCRIPT, top_logprobs=K, fault=Fault(call="write", number=1)))
    with caplog.at_level(logging.CRITICAL):
        streams.open("client", {7: REQUEST, 8: REQUEST})
        failures: dict[int, str] = {}
        ended: set[int] = set()
        while not (failures and ended):
            batch = await streams.poll("client", 5.0)
            failures |= batch.failures
            ended |= {stream_id for stream_id, written in batch.unpack() if written.finish_reason}
    assert failures == {7: "ScriptedError: write 1 fails, as scripted"}
    assert ended == {8}


async def test_a_failed_score_stands_in_its_place() -> None:
    streams = StreamMultiplexer(ScriptedEngine(SCRIPT, top_logprobs=K, fault=Fault(call="score", number=2)))
    requests = [ScoreRequest(token_ids=REQUEST.prefix, start=1)] * 3
    first, second, third = (await streams.score(ReadBatch.pack(requests))).unpack()
    assert second == "ScriptedError: score 2 fails, as scripted"
    assert isinstance(first, TopLogprobs)
    assert isinstance(third, TopLogprobs)
    assert len(first) == 3


async def test_a_poll_without_news_returns_empty_handed_when_its_time_is_over() -> None:
    batch = await StreamMultiplexer(ScriptedEngine(SCRIPT, top_logprobs=K)).poll("client", 0.01)
    assert list(batch.unpack()) == []
    assert batch.failures == {}
