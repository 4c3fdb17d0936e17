"""A scripted engine behind a real Ray actor: the controller can't tell it from one in its own process."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
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
from rollout_server.engine import ScoreRequest, WriteRequest, Written
from rollout_server.engines.multiplex import ReadBatch, RowsBatch, StreamMultiplexer, WrittenBatch
from rollout_server.engines.remote import EngineCallError, RemoteEngine
from rollout_server.engines.scripted import Fault, HashedScript, ScriptedEngine

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
            self._engine = ScriptedEngine(script, top_logprobs=4, **settings)
            self._streams = StreamMultiplexer(self._engine)
            self._num_calls: Counter[str] = Counter()

        async def open_streams(self, client_id: str, requests: dict[int, WriteRequest]) -> None:
            self._num_calls["open_streams"] += 1
            self._streams.open(client_id, requests)

        async def poll(self, client_id: str, wait_s: float) -> WrittenBatch:
            self._num_calls["poll"] += 1
            return await self._streams.poll(client_id, wait_s)

        async def resume_streams(self, client_id: str, stream_ids: Sequence[int]) -> None:
            self._num_calls["resume_streams"] += 1
            self._streams.resume(client_id, stream_ids)

        async def close_streams(self, client_id: str, stream_ids: Sequence[int]) -> None:
            self._num_calls["close_streams"] += 1
            await self._streams.close(client_id, stream_ids)

        async def score(self, requests: ReadBatch) -> RowsBatch:
            self._num_calls["score"] += 1
            return await self._streams.score(requests)

        async def load_weights(self, update: WeightUpdate) -> None:
            await self._engine.load_weights(update)

        async def num_running(self) -> int:
            return self._engine.num_running

        async def num_calls(self) -> dict[str, int]:
            return dict(self._num_calls)

    return ScriptedActor


async def exhaust(stream: AsyncGenerator[Written, None]) -> None:
    async for _ in stream:
        pass


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


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
        async with aclosing(controller.collect(prompts)) as finished:
            return {seq.prompt.prompt_id: [*seq.token_ids.tolist(), -1, *seq.switches] async for seq in finished}

    here = await collect(*(ScriptedEngine(script, top_logprobs=K) for script in (student_script, SCRIPT)))
    (student, student_handle), (teacher, teacher_handle) = remote(student_script), remote()
    assert await collect(student, teacher) == here
    await asyncio.gather(student.settle(), teacher.settle())
    assert [await handle.num_running.remote() for handle in (student_handle, teacher_handle)] == [0, 0]


async def test_closing_a_stream_ends_it_in_the_engine(remote: Remote) -> None:
    engine, handle = remote(replace(SCRIPT, eos_probability=1e-9), delay=lambda: 0.001)
    async with aclosing(engine.stream(ENDLESS)) as kept, aclosing(engine.stream(ENDLESS)) as dropped:
        await asyncio.gather(anext(kept), anext(dropped))
        assert await handle.num_running.remote() == 2
        await dropped.aclose()
        await engine.settle()
        assert await handle.num_running.remote() == 1
        await anext(kept)
    await engine.settle()
    assert await handle.num_running.remote() == 0


async def test_a_stream_that_nobody_waits_for_any_more_ends_too(remote: Remote) -> None:
    engine, handle = remote(replace(SCRIPT, eos_probability=1e-9), delay=lambda: 0.001)
    writing = asyncio.create_task(engine.generate(ENDLESS))
    while not await handle.num_running.remote():
        await asyncio.sleep(0.01)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await engine.settle()
    assert await handle.num_running.remote() == 0


async def test_calls_of_one_turn_of_the_event_loop_travel_together(remote: Remote) -> None:
    engine, handle = remote()
    rows = await asyncio.gather(*(engine.score(SCORE) for _ in range(50)))
    assert [len(each) for each in rows] == [3] * 50
    await asyncio.gather(*(engine.generate(REQUEST) for _ in range(50)))
    num_calls = await handle.num_calls.remote()
    assert num_calls["score"] == 1
    assert num_calls["open_streams"] == 1
    assert "close_streams" not in num_calls


@pytest.mark.parametrize("call", ["write", "score"])
async def test_a_failure_in_the_engine_names_the_engine(remote: Remote, call: str) -> None:
    engine, _ = remote(fault=Fault(call=call, number=2))  # type: ignore[arg-type]
    ask = (lambda: engine.generate(REQUEST)) if call == "write" else (lambda: engine.score(SCORE))
    results = await asyncio.gather(ask(), ask(), ask(), return_exceptions=True)
    assert isinstance(results[1], EngineCallError)
    assert str(results[1]) == f"teacher: ScriptedError: {call} 2 fails, as scripted"
    assert all(isinstance(result, Written | TopLogprobs) for result in (results[0], results[2]))


@pytest.mark.parametrize(
    ("call", "waited_for"), [("write", "the next tokens of a stream"), ("score", r"(a score|1 scores)")]
)
async def test_a_call_that_hangs_ends_after_its_time_and_says_what_did_not_come(
    remote: Remote, call: str, waited_for: str
) -> None:
    engine, handle = remote(call_timeout_s=1.0, fault=Fault(call=call, number=1, hangs=True))  # type: ignore[arg-type]
    started = time.monotonic()
    with pytest.raises(EngineCallError, match=f"^teacher: waited 1 s for {waited_for}$"):
        await (engine.generate(REQUEST) if call == "write" else engine.score(SCORE))
    assert 0.9 < time.monotonic() - started < 4.0
    if call == "write":
        await engine.settle()
        assert await handle.num_running.remote() == 0


async def test_a_quiet_poll_does_not_time_out_before_its_streams(remote: Remote) -> None:
    """A poll outlives the streams it was sent for; those opened later have their own time to wait."""
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
        with pytest.raises(EngineCallError, match=r"^teacher: a poll failed: "):
            await exhaust(stream)
    with pytest.raises(EngineCallError, match=r"^teacher: 1 scores failed: "):
        await engine.score(SCORE)


async def test_new_weights_reach_the_engine(remote: Remote) -> None:
    engine, _ = remote()
    await engine.load_weights(WeightUpdate(version=5))
    assert (await engine.generate(REQUEST)).weight_version == 5
