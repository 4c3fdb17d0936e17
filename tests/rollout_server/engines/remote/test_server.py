import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from common.sequence import TopLogprobs
from rollout_server.engines.protocol import GoOn, ScoreRequest, WriteRequest, Written, concatenate_written
from rollout_server.engines.remote import server
from rollout_server.engines.remote.messages import ClientMessage, ScoreBatch, ServerMessage
from rollout_server.engines.remote.server import StreamMultiplexer
from rollout_server.engines.scripted import Fault, HashedScript, ScriptedEngine

SCRIPT = HashedScript(vocabulary_size=32, seed=1, eos_probability=0.01)
K = 4
REQUEST = WriteRequest(
    prefix=np.array([5, 6, 7], np.int32), max_tokens=30, temperature=1.0, top_p=1.0, seed=0, chunk_tokens=4
)
ENDLESS = replace(REQUEST, max_tokens=100_000, chunk_tokens=1)


class NumberedStreams(StreamMultiplexer):
    """Numbers each client's message as they are given."""

    def __init__(self, engine: ScriptedEngine) -> None:
        super().__init__(engine)
        self._numbers: defaultdict[str, Iterator[int]] = defaultdict(count)

    async def exchange(self, client_id: str, message: ClientMessage, wait_s: float) -> ServerMessage:
        return await super().exchange(client_id, replace(message, number=next(self._numbers[client_id])), wait_s)


def message(
    opens: dict[int, WriteRequest] | None = None,
    resumes: dict[int, GoOn] | None = None,
    closes: list[int] | None = None,
    scores: dict[int, ScoreRequest] | None = None,
) -> ClientMessage:
    return ClientMessage(
        number=0,
        opens=opens or {},
        resumes=resumes or {},
        closes=closes or [],
        scores=ScoreBatch.pack(list((scores or {}).items())),
    )


async def until_still(engine: ScriptedEngine, num_running: int = 0) -> None:
    """Closing is not waited for: it takes a few turns of the event loop."""
    async with asyncio.timeout(2.0):
        while engine.num_running != num_running:
            await asyncio.sleep(0.001)


async def drain(
    streams: StreamMultiplexer, client_id: str, reply: ServerMessage, num_streams: int
) -> dict[int, Written]:
    """What each stream of a client wrote, once all have ended."""
    parts: dict[int, list[Written]] = {}
    ended = 0
    while True:
        for call_id, written in reply.written.unpack():
            parts.setdefault(call_id, []).append(written)
            ended += written.finish_reason is not None
        if ended == num_streams:
            return {call_id: concatenate_written(written) for call_id, written in parts.items()}
        reply = await streams.exchange(client_id, message(), 5.0)


async def test_scores_come_back_as_they_were_asked_for() -> None:
    engine = ScriptedEngine(SCRIPT, top_logprobs=K)
    streams = NumberedStreams(engine)
    requests = {
        10 + n: ScoreRequest(token_ids=np.arange(n, n + 6, dtype=np.int32)[: 3 + n], start=start, sequence_id=str(n))
        for n, start in enumerate((1, 4, 2))
    }
    reply = await streams.exchange("client", message(scores=requests), 5.0)
    rows = dict(reply.rows.unpack())
    while len(rows) < 3:
        rows |= dict((await streams.exchange("client", message(), 5.0)).rows.unpack())
    for call_id, request in requests.items():
        theirs = await engine.score(request)
        np.testing.assert_array_equal(rows[call_id].token_ids, theirs.token_ids)
        np.testing.assert_array_equal(rows[call_id].logprobs, theirs.logprobs)


async def test_many_streams_arrive_whole() -> None:
    engine = ScriptedEngine(SCRIPT, top_logprobs=K)
    streams = NumberedStreams(engine)
    requests = {number: replace(REQUEST, seed=number) for number in range(20)}
    reply = await streams.exchange("client", message(requests), 5.0)
    written = await drain(streams, "client", reply, len(requests))
    for call_id, request in requests.items():
        expected = await engine.generate(request)
        np.testing.assert_array_equal(written[call_id].token_ids, expected.token_ids)
        np.testing.assert_array_equal(written[call_id].top.logprobs, expected.top.logprobs)
    assert engine.num_running == 0


async def test_two_clients_may_choose_the_same_ids() -> None:
    engine = ScriptedEngine(SCRIPT, top_logprobs=K)
    streams = NumberedStreams(engine)

    async def write(client_id: str, request: WriteRequest) -> Written:
        reply = await streams.exchange(client_id, message({0: request}), 5.0)
        return (await drain(streams, client_id, reply, 1))[0]

    a, b = await asyncio.gather(write("a", REQUEST), write("b", replace(REQUEST, seed=1)))
    np.testing.assert_array_equal(a.token_ids, (await engine.generate(REQUEST)).token_ids)
    np.testing.assert_array_equal(b.token_ids, (await engine.generate(replace(REQUEST, seed=1))).token_ids)
    assert a.token_ids.tolist() != b.token_ids.tolist()


async def test_a_paused_stream_goes_on_after_the_token_it_is_sent() -> None:
    engine = ScriptedEngine(SCRIPT, top_logprobs=K)
    streams = NumberedStreams(engine)
    request = replace(REQUEST, pause_after=3, temperature=0.0, max_tokens=8, chunk_tokens=8, ignore_eos=True)
    first = dict((await streams.exchange("client", message({0: request}), 5.0)).written.unpack())[0]
    other = (int(first.token_ids[-1]) + 1) % SCRIPT.vocabulary_size
    rest = dict((await streams.exchange("client", message(resumes={0: GoOn(token_id=other)}), 5.0)).written.unpack())[0]
    text = np.concatenate([REQUEST.prefix, first.token_ids[:-1], np.array([other], np.int32)])
    assert rest.token_ids[0] == SCRIPT.next_logprobs(text).argmax()


async def test_orders_need_not_wait_for_news() -> None:
    """An exchange ends the wait of the one before, and only then waits itself."""
    streams = NumberedStreams(ScriptedEngine(SCRIPT, top_logprobs=K))
    waiting = asyncio.create_task(streams.exchange("client", message(), 30.0))
    await asyncio.sleep(0.01)
    reply = await asyncio.wait_for(streams.exchange("client", message({0: REQUEST}), 30.0), 5.0)
    earlier = await asyncio.wait_for(waiting, 5.0)
    assert {call_id for call_id, _ in [*earlier.written.unpack(), *reply.written.unpack()]} == {0}


async def test_an_exchange_that_overtook_another_waits_for_its_turn() -> None:
    streams = StreamMultiplexer(ScriptedEngine(SCRIPT, top_logprobs=K))
    later = asyncio.create_task(streams.exchange("client", replace(message(closes=[0]), number=1), 0.0))
    await asyncio.sleep(0.01)
    earlier = await streams.exchange("client", replace(message({0: REQUEST}), number=0), 0.0)
    reply = await asyncio.wait_for(later, 5.0)
    assert (list(earlier.written.unpack()), list(reply.written.unpack())) == ([], [])


async def test_no_read_is_lost_while_others_are_reported() -> None:
    delays = iter(0.001 * number for number in range(40))
    streams = NumberedStreams(ScriptedEngine(SCRIPT, top_logprobs=K, delay=lambda: next(delays)))
    reads = {number: ScoreRequest(token_ids=REQUEST.prefix, start=1) for number in range(40)}
    reply = await streams.exchange("client", message(scores=reads), 5.0)
    read = set(reply.rows.call_ids.tolist())
    async with asyncio.timeout(10.0):
        while len(read) < 40:
            reply = await streams.exchange("client", message(), 5.0)
            read |= set(reply.rows.call_ids.tolist())
    assert read == set(reads)


async def test_closing_ends_the_streams_named_and_forgets_what_they_wrote() -> None:
    engine = ScriptedEngine(replace(SCRIPT, eos_probability=1e-9), top_logprobs=K, delay=lambda: 0.001)
    streams = NumberedStreams(engine)
    await streams.exchange("client", message({0: ENDLESS, 1: ENDLESS, 2: ENDLESS}), 0.0)
    await asyncio.sleep(0.02)
    reply = await streams.exchange("client", message(closes=[0, 2]), 1.0)
    await until_still(engine, 1)
    assert set(reply.written.call_ids.tolist()) == {1}
    await streams.exchange("client", message(closes=[1]), 0.0)
    await until_still(engine)


async def test_a_read_can_be_closed_too() -> None:
    engine = ScriptedEngine(SCRIPT, top_logprobs=K, fault=Fault(call="score", number=1, hangs=True))
    streams = NumberedStreams(engine)
    await streams.exchange("client", message(scores={5: ScoreRequest(token_ids=REQUEST.prefix, start=1)}), 0.01)
    await until_still(engine, 1)
    await streams.exchange("client", message(closes=[5]), 0.0)
    await until_still(engine)


async def test_a_stream_may_be_closed_before_it_began_or_after_it_ended() -> None:
    engine = ScriptedEngine(SCRIPT, top_logprobs=K)
    streams = NumberedStreams(engine)
    await streams.exchange("client", message({0: REQUEST}, closes=[0]), 0.0)
    assert engine.num_calls["write"] == 0
    reply = await streams.exchange("client", message({1: REQUEST}), 5.0)
    await drain(streams, "client", reply, 1)
    await streams.exchange("client", message(closes=[1, 77]), 0.0)


async def test_what_a_client_left_behind_that_died_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_CLIENT_TIMEOUT_S", 0.05)
    engine = ScriptedEngine(replace(SCRIPT, eos_probability=1e-9), top_logprobs=K, delay=lambda: 0.001)
    streams = NumberedStreams(engine)
    await streams.exchange("dead", message({0: ENDLESS}), 1.0)
    await streams.exchange("alive", message({0: ENDLESS}), 1.0)
    await asyncio.sleep(0.03)
    await streams.exchange("alive", message(), 0.0)
    assert engine.num_running == 2
    await asyncio.sleep(0.04)
    await streams.exchange("alive", message(), 0.0)
    await until_still(engine, 1)
    assert (await streams.exchange("alive", message(closes=[0]), 1.0)).failures == {}
    await until_still(engine)


async def test_a_failed_stream_is_reported_and_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    streams = NumberedStreams(ScriptedEngine(SCRIPT, top_logprobs=K, fault=Fault(call="write", number=1)))
    with caplog.at_level(logging.CRITICAL):
        reply = await streams.exchange("client", message({7: REQUEST, 8: REQUEST}), 5.0)
        failures, ended = dict(reply.failures), {i for i, written in reply.written.unpack() if written.finish_reason}
        while not (failures and ended):
            reply = await streams.exchange("client", message(), 5.0)
            failures |= reply.failures
            ended |= {call_id for call_id, written in reply.written.unpack() if written.finish_reason}
    assert failures == {7: "ScriptedError: write 1 fails as scripted"}
    assert ended == {8}


async def test_a_failed_score_is_reported_and_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    streams = NumberedStreams(ScriptedEngine(SCRIPT, top_logprobs=K, fault=Fault(call="score", number=2)))
    reads = {number: ScoreRequest(token_ids=REQUEST.prefix, start=1) for number in range(3)}
    failures: dict[int, str] = {}
    rows: dict[int, TopLogprobs] = {}
    with caplog.at_level(logging.CRITICAL):
        reply = await streams.exchange("client", message(scores=reads), 5.0)
        while True:
            failures |= reply.failures
            rows |= dict(reply.rows.unpack())
            if len(failures) + len(rows) == 3:
                break
            reply = await streams.exchange("client", message(), 5.0)
    assert failures == {1: "ScriptedError: score 2 fails as scripted"}
    assert {call_id: len(top) for call_id, top in rows.items()} == {0: 3, 2: 3}


async def test_an_exchange_without_news_returns_empty_handed_when_its_time_is_over() -> None:
    reply = await NumberedStreams(ScriptedEngine(SCRIPT, top_logprobs=K)).exchange("client", message(), 0.01)
    assert (list(reply.written.unpack()), list(reply.rows.unpack()), reply.failures) == ([], [], {})


async def test_a_call_that_hangs_stands_still_while_others_that_write_do_not() -> None:
    endless = replace(ENDLESS, ignore_eos=True)
    hanging = StreamMultiplexer(ScriptedEngine(SCRIPT, top_logprobs=K, fault=Fault(call="write", number=1, hangs=True)))
    writing = StreamMultiplexer(ScriptedEngine(SCRIPT, top_logprobs=K, delay=lambda: 0.01))
    assert (hanging.num_busy, hanging.still_s) == (0, 0.0)
    for streams in (hanging, writing):
        await streams.exchange("c", replace(message(opens={0: endless}), number=0), 0.0)
    await asyncio.sleep(0.3)
    assert (hanging.num_busy, writing.num_busy) == (1, 1)
    assert hanging.still_s > 0.25
    assert writing.still_s < 0.2
    for streams in (hanging, writing):
        streams.drop_calls()
    assert (hanging.num_busy, hanging.still_s) == (0, 0.0)


async def test_a_call_that_waits_for_its_reader_is_not_busy() -> None:
    streams = StreamMultiplexer(ScriptedEngine(SCRIPT, top_logprobs=K))
    request = replace(ENDLESS, pause_after=3, ignore_eos=True)
    await streams.exchange("c", replace(message(opens={0: request}), number=0), 1.0)
    async with asyncio.timeout(2.0):
        while streams.num_busy:
            await asyncio.sleep(0.01)
    await streams.exchange("c", replace(message(resumes={0: GoOn()}), number=1), 0.0)
    assert streams.num_busy == 1
    streams.drop_calls()


async def test_dropped_calls_leave_nothing_running_in_the_engine_and_who_waits_for_one_hears_of_it() -> None:
    engine = ScriptedEngine(SCRIPT, top_logprobs=K, delay=lambda: 0.01)
    streams = StreamMultiplexer(engine)
    for client in ("a", "b"):
        await streams.exchange(client, replace(message(opens={0: ENDLESS, 1: ENDLESS}), number=0), 0.0)
    await until_still(engine, 4)
    waiting = asyncio.create_task(streams.exchange("a", replace(message(), number=1), 5.0))
    await asyncio.sleep(0)
    streams.drop_calls()
    assert set((await asyncio.wait_for(waiting, 1.0)).failures) == {0, 1}
    await until_still(engine)
