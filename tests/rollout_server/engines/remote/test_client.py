"""A scripted engine behind a real Ray actor: the controller can't tell it from one in its own process."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

from common.config import AdaSwitch, Sampling
from common.sequence import Prompt, TopLogprobs
from common.weights import WeightUpdate
from rollout_server.controller import SwitchingController
from rollout_server.engines.protocol import GoOn, ScoreRequest, WriteRequest, Written, next_piece
from rollout_server.engines.remote.client import EngineCallError, RemoteEngine, message_spacing_s
from rollout_server.engines.remote.messages import ClientMessage, ServerMessage
from rollout_server.engines.remote.server import StreamMultiplexer
from rollout_server.engines.scripted import Fault, HashedScript, ScriptedEngine
from rollout_server.pool import generate_all
from tests.support.ray_heads import joined

SCRIPT = HashedScript(vocabulary_size=32, seed=1, eos_probability=0.01)
K = 4
REQUEST = WriteRequest(
    prefix=np.array([5, 6, 7], np.int32), max_tokens=30, temperature=1.0, top_p=1.0, seed=0, chunk_tokens=4
)
ENDLESS = replace(REQUEST, max_tokens=100_000, chunk_tokens=1)
SCORE = ScoreRequest(token_ids=REQUEST.prefix, start=1)

Remote = Callable[..., tuple[RemoteEngine, Any]]


def make_actor_class() -> type:
    """Made in a function, so that Ray sends it by value: its processes can't import a test file."""

    class ScriptedActor:
        """The calls RemoteEngine makes, over a scripted engine, and how often each was made."""

        def __init__(self, script: Any, settings: dict[str, Any]) -> None:
            self._loses = settings.pop("loses", None)  # the exchange of this number never arrives
            self._engine = ScriptedEngine(script, top_logprobs=4, **settings)
            self._streams = StreamMultiplexer(self._engine)
            self._num_calls: Counter[str] = Counter()

        async def exchange(self, client_id: str, message: ClientMessage, wait_s: float) -> ServerMessage:
            self._num_calls.update(
                exchange=1,
                opening=bool(message.opens),
                reading=bool(message.scores.call_ids.size),
                closing=bool(message.closes),
            )
            if self._num_calls["exchange"] == self._loses:
                raise ConnectionError("lost on the way")
            return await self._streams.exchange(client_id, message, wait_s)

        async def load_weights(self, update: WeightUpdate) -> None:
            await self._engine.load_weights(update)

        async def num_running(self) -> int:
            return self._engine.num_running

        async def num_calls(self) -> dict[str, int]:
            return dict(self._num_calls)

    return ScriptedActor


async def until_still(handle: Any, num_running: int = 0) -> None:
    """Dropping a call is not waited for."""
    async with asyncio.timeout(10.0):
        while await handle.num_running.remote() != num_running:
            await asyncio.sleep(0.01)


async def exhaust(stream: AsyncGenerator[Written, None]) -> None:
    async for _ in stream:
        pass


@pytest.fixture(scope="module", autouse=True)
def _cluster(ray_address: str) -> Iterator[None]:
    with joined(ray_address):
        yield


@pytest.fixture
def remote() -> Iterator[Remote]:
    """Starts an engine behind an actor: what the controller would hold, and the actor's handle."""
    handles = []

    def start(script: Any = SCRIPT, *, call_timeout_s: float = 60.0, **settings: Any) -> tuple[RemoteEngine, Any]:
        handle = ray.remote(num_cpus=0, max_concurrency=1000)(make_actor_class()).remote(script, settings)
        ray.get(handle.num_calls.remote())  # started: a time-out then means the call's own time
        handles.append(handle)
        return RemoteEngine(handle, name="teacher", call_timeout_s=call_timeout_s), handle

    yield start
    for handle in handles:
        ray.kill(handle)


async def test_streams_and_scores_are_those_of_the_engine_itself(remote: Remote) -> None:
    engine, _ = remote()
    here = ScriptedEngine(SCRIPT, top_logprobs=K)
    requests = [replace(REQUEST, seed=seed) for seed in range(10)]
    written = await asyncio.gather(*map(engine.generate, requests))
    for there, request in zip(written, requests, strict=True):
        expected = await here.generate(request)
        np.testing.assert_array_equal(there.token_ids, expected.token_ids)
        np.testing.assert_array_equal(there.logprobs, expected.logprobs)
        np.testing.assert_array_equal(there.top.logprobs, expected.top.logprobs)
        assert there.finish_reason == expected.finish_reason
    rows = await engine.score(SCORE)
    np.testing.assert_array_equal(rows.logprobs, (await here.score(SCORE)).logprobs)


async def test_the_controller_writes_the_same_sequences_over_remote_engines(remote: Remote) -> None:
    student_script = SCRIPT.student(seed=2)
    prompts = [Prompt(prompt_id=f"p{n}", token_ids=np.arange(3 + n, dtype=np.int32), seed=n) for n in range(6)]

    async def collect(student: Any, teacher: Any) -> dict[str, list[int]]:
        controller = SwitchingController(
            student=student,
            teacher=teacher,
            policy=AdaSwitch(window=3),
            sampling=Sampling(max_new_tokens=30, chunk_tokens=4),
            top_logprobs=K,
            stop_token_ids=(SCRIPT.eos_token_id,),
        )
        async with aclosing(generate_all(controller, prompts, max_in_flight=256)) as batches:
            sequences = [sequence async for finished in batches for sequence in finished]
        return {seq.prompt.prompt_id: [*seq.token_ids.tolist(), -1, *seq.switches] for seq in sequences}

    here = await collect(*(ScriptedEngine(script, top_logprobs=K) for script in (student_script, SCRIPT)))
    (student, student_handle), (teacher, teacher_handle) = remote(student_script), remote()
    assert await collect(student, teacher) == here
    await asyncio.gather(until_still(student_handle), until_still(teacher_handle))


async def test_closing_a_stream_ends_it_in_the_engine(remote: Remote) -> None:
    engine, handle = remote(replace(SCRIPT, eos_probability=1e-9), delay=lambda: 0.001)
    async with aclosing(engine.stream(ENDLESS)) as kept, aclosing(engine.stream(ENDLESS)) as dropped:
        await asyncio.gather(anext(kept), anext(dropped))
        assert await handle.num_running.remote() == 2
        await dropped.aclose()
        await until_still(handle, 1)
        await anext(kept)
    await until_still(handle)


async def test_a_stream_that_nobody_waits_for_any_more_ends_too(remote: Remote) -> None:
    engine, handle = remote(replace(SCRIPT, eos_probability=1e-9), delay=lambda: 0.001)
    writing = asyncio.create_task(engine.generate(ENDLESS))
    while not await handle.num_running.remote():
        await asyncio.sleep(0.01)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await until_still(handle)


async def test_calls_of_one_turn_of_the_event_loop_travel_together(remote: Remote) -> None:
    engine, handle = remote()
    rows = await asyncio.gather(*(engine.score(SCORE) for _ in range(50)))
    assert [len(each) for each in rows] == [3] * 50
    await asyncio.gather(*(engine.generate(REQUEST) for _ in range(50)))
    num_calls = await handle.num_calls.remote()
    assert (num_calls["reading"], num_calls["opening"], num_calls["closing"]) == (1, 1, 0)


def test_an_engine_with_many_calls_gets_fewer_messages_unless_many_of_them_wait_for_one() -> None:
    few = message_spacing_s(num_calls=40, num_gathered=0)
    many = message_spacing_s(num_calls=200, num_gathered=1)
    assert few < many < message_spacing_s(num_calls=10_000, num_gathered=1) == 0.1
    assert message_spacing_s(num_calls=300, num_gathered=300) == few


async def test_a_call_among_many_waits_for_company_and_all_together_do_not(remote: Remote) -> None:
    """However many are under way, a message is sent when it is due or when many wait for it, whichever comes first."""
    engine, handle = remote()
    streams = [engine.stream(replace(ENDLESS, seed=seed, pause_after=1)) for seed in range(300)]
    await asyncio.gather(*map(next_piece, streams))

    async def turns(moved: list[AsyncGenerator[Written, GoOn | None]]) -> float:
        started_s = time.perf_counter()
        for _ in range(3):
            await asyncio.gather(*(next_piece(stream, GoOn(num_tokens=1)) for stream in moved))
        return time.perf_counter() - started_s

    alone_s = await turns(streams[:1])
    assert alone_s >= 2 * message_spacing_s(num_calls=300, num_gathered=1)
    before = await handle.num_calls.remote()
    await turns(streams)
    after = await handle.num_calls.remote()
    assert after["exchange"] - before["exchange"] < 3 * 8, "all of them travel in a few messages"
    await asyncio.gather(*(stream.aclose() for stream in streams))
    await until_still(handle)


@pytest.mark.parametrize("call", ["write", "score"])
async def test_a_failure_in_the_engine_names_the_engine(remote: Remote, call: str) -> None:
    engine, _ = remote(fault=Fault(call=call, number=2))  # type: ignore[arg-type]
    ask = (lambda: engine.generate(REQUEST)) if call == "write" else (lambda: engine.score(SCORE))
    results = await asyncio.gather(ask(), ask(), ask(), return_exceptions=True)
    assert isinstance(results[1], EngineCallError)
    assert str(results[1]) == f"teacher: ScriptedError: {call} 2 fails as scripted"
    assert all(isinstance(result, Written | TopLogprobs) for result in (results[0], results[2]))


@pytest.mark.parametrize(("call", "waited_for"), [("write", "the next tokens of a stream"), ("score", "a score")])
async def test_a_call_that_hangs_ends_after_its_time_and_says_what_did_not_come(
    remote: Remote, call: str, waited_for: str
) -> None:
    engine, handle = remote(call_timeout_s=1.0, fault=Fault(call=call, number=1, hangs=True))  # type: ignore[arg-type]
    started = time.monotonic()
    with pytest.raises(EngineCallError, match=f"^teacher: waited 1 s for {waited_for}$"):
        await (engine.generate(REQUEST) if call == "write" else engine.score(SCORE))
    assert 0.9 < time.monotonic() - started < 4.0
    if call == "write":
        await until_still(handle)


async def test_a_call_may_wait_longer_while_the_engine_gets_on_with_others(remote: Remote) -> None:
    """As where more is in flight than it runs at once."""
    hangs = Fault(call="score", number=1, hangs=True)
    engine, _ = remote(replace(SCRIPT, eos_probability=1e-9), call_timeout_s=1.0, delay=lambda: 0.05, fault=hangs)
    started_s = time.monotonic()
    waiting = asyncio.create_task(engine.score(SCORE))
    async with aclosing(engine.stream(ENDLESS)) as stream:
        while time.monotonic() - started_s < 2.5:
            await anext(stream)
            assert not waiting.done()
    with pytest.raises(EngineCallError, match=r"^teacher: waited 1 s for a score$"):
        await waiting
    assert 3.4 < time.monotonic() - started_s < 8.0


async def test_a_quiet_exchange_does_not_time_out_before_its_streams(remote: Remote) -> None:
    """An exchange outlives the streams it was sent for; those opened later have their own time to wait."""
    engine, _ = remote(replace(SCRIPT, eos_probability=1e-9), call_timeout_s=2.0, delay=lambda: 1.2)
    async with aclosing(engine.stream(ENDLESS)) as dropped:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(dropped), 0.3)
    await asyncio.sleep(0.5)
    assert len(await engine.generate(replace(ENDLESS, max_tokens=1))) == 1


async def test_an_engine_whose_process_died_fails_by_name(remote: Remote) -> None:
    engine, handle = remote(replace(SCRIPT, eos_probability=1e-9), delay=lambda: 0.001)
    async with aclosing(engine.stream(ENDLESS)) as stream:
        await anext(stream)
        ray.kill(handle)
        with pytest.raises(EngineCallError, match=r"^teacher: an answer failed: "):
            await exhaust(stream)
    with pytest.raises(EngineCallError, match=r"^teacher: an answer failed: "):
        await engine.score(SCORE)


async def test_after_a_lost_exchange_a_living_engine_serves_on_and_the_calls_before_it_end(remote: Remote) -> None:
    engine, handle = remote(replace(SCRIPT, eos_probability=1e-9), loses=3, delay=lambda: 0.001)
    async with aclosing(engine.stream(ENDLESS)) as stream:
        with pytest.raises(EngineCallError, match=r"(?s)^teacher: an answer failed: .*lost on the way$"):
            await exhaust(stream)
    async with asyncio.timeout(10.0):
        assert len(await engine.generate(REQUEST)) == REQUEST.max_tokens
    await until_still(handle)


async def test_a_paused_stream_goes_on_after_the_token_it_is_sent(remote: Remote) -> None:
    engine, _ = remote()
    here = ScriptedEngine(SCRIPT, top_logprobs=K)
    request = replace(REQUEST, pause_after=1, max_tokens=8, ignore_eos=True, temperature=0.0)
    texts = []
    for each in (engine, here):
        async with aclosing(each.stream(request)) as pieces:
            token_ids, sent = [], None
            while (piece := await next_piece(pieces, sent)) is not None:
                token_ids += piece.token_ids.tolist()
                sent = GoOn(num_tokens=1, token_id=len(token_ids))
        texts.append(token_ids)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 8


async def test_new_weights_reach_the_engine(remote: Remote) -> None:
    engine, _ = remote()
    await engine.load_weights(WeightUpdate(version=5))
    assert (await engine.generate(REQUEST)).weight_version == 5
