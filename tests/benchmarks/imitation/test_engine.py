import asyncio
import time
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest

from common.config import AdaSwitch, Decay, Policy, Relay, Sampling
from common.sequence import Prompt, TopLogprobs
from common.weights import WeightUpdate
from rollout_server.controller import SwitchingController
from rollout_server.engines.protocol import ScoreRequest, WriteRequest, Written, concatenate_written
from rollout_server.engines.scripted import Fault, ScriptedError
from rollout_server.engines.selftest import check_engine
from rollout_server.verifier import compare
from tests.benchmarks.imitation.accelerator import DeviceCounters, PrefixCache
from tests.benchmarks.imitation.engine import ImitatedEngine
from tests.benchmarks.imitation.speeds import EOS_TOKEN_ID, AcceleratorSpeeds, ImitatedText
from tests.support.streams import pieces_of, sequences_of

K = 8
TEXT = ImitatedText(vocabulary_size=1000)
SPEEDS = AcceleratorSpeeds(
    decode_tokens_per_s=8_000.0, prefill_tokens_per_s=100_000.0, full_batch=16, step_floor_s=0.001, text=TEXT
)
FAST = replace(SPEEDS, decode_tokens_per_s=1e6, prefill_tokens_per_s=1e7, step_floor_s=1e-6)
PREFIX = np.arange(5, 45, dtype=np.int32)
REQUEST = WriteRequest(prefix=PREFIX, max_tokens=60, temperature=1.0, top_p=1.0, seed=3, chunk_tokens=16)


def start(speeds: AcceleratorSpeeds = FAST, *, max_num_seqs: int = 16, fault: Fault | None = None) -> ImitatedEngine:
    return ImitatedEngine(speeds, top_logprobs=K, max_num_seqs=max_num_seqs, max_model_len=2048, fault=fault)


async def spent(engine: ImitatedEngine, *calls: object) -> tuple[float, DeviceCounters]:
    """Seconds that the calls took together, and what the device did."""
    before, started_s = engine.counters, time.perf_counter()
    await asyncio.gather(*calls)  # type: ignore[call-overload]
    return time.perf_counter() - started_s, engine.counters - before


async def test_it_passes_the_self_test_of_a_real_engine() -> None:
    await check_engine(start(), name="imitated", prefix=PREFIX, top_logprobs=K, dtype="float32")


async def test_what_is_read_is_what_was_written() -> None:
    engine = start()
    written = await engine.generate(REQUEST)
    text = np.concatenate([PREFIX, written.token_ids[:-1]])
    rows = await engine.score(ScoreRequest(token_ids=text, start=PREFIX.size))
    np.testing.assert_array_equal(rows.token_ids, written.top.token_ids)
    np.testing.assert_array_equal(rows.logprobs, written.top.logprobs)
    np.testing.assert_array_equal(written.logprobs, written.top.logprob_of(written.token_ids))


@pytest.mark.parametrize("turns", [[], [1, 6, 33]])
async def test_the_same_request_gives_the_same_tokens_however_it_is_cut(
    turns: list[int],
) -> None:
    engine = start()
    whole = await engine.generate(replace(REQUEST, chunk_tokens=1000))
    pieces = await pieces_of(engine, REQUEST, turns)
    again = concatenate_written(pieces)
    np.testing.assert_array_equal(again.token_ids, whole.token_ids)
    np.testing.assert_array_equal(again.top.logprobs, whole.top.logprobs)
    if turns:
        assert [len(piece) for piece in pieces] == [1, 6, 33, 20]
    other = await engine.generate(replace(REQUEST, seed=4))
    assert other.token_ids.tolist() != whole.token_ids.tolist()


async def test_nothing_is_written_beyond_a_pause_before_the_reader_comes_back() -> None:
    engine = start()
    async with aclosing(engine.stream(replace(REQUEST, pause_after=5))) as stream:
        await anext(stream)
        await asyncio.sleep(0.01)
        assert engine.counters.num_generated_tokens == 5
        await anext(stream)
        assert engine.counters.num_generated_tokens == 60


async def test_who_waits_for_its_reader_keeps_its_place_and_goes_on_first() -> None:
    engine = start(max_num_seqs=1)
    request = replace(REQUEST, pause_after=5)
    async with aclosing(engine.stream(request)) as first:
        await anext(first)
        second = asyncio.create_task(engine.generate(request))
        await asyncio.sleep(0.02)
        assert not second.done()
        assert len(await anext(first)) == 55
        assert len(await second) == 60
    async with aclosing(engine.stream(request)) as first:
        await anext(first)
        second = asyncio.create_task(engine.generate(request))
        await asyncio.sleep(0.01)
    assert len(await second) == 60, "a dropped one leaves its place"


async def test_pieces_end_where_the_whole_text_fills_a_chunk() -> None:
    engine = start(replace(FAST, step_floor_s=1e-3, decode_tokens_per_s=16e3))
    async with aclosing(engine.stream(REQUEST)) as stream:
        assert [len(piece) async for piece in stream] == [8, 16, 16, 16, 4]


async def test_a_text_ends_at_its_limit_a_stop_token_or_the_end_of_sequence() -> None:
    written = await start().generate(REQUEST)
    assert (len(written), written.finish_reason) == (60, "length")
    stop = int(written.token_ids[30])
    stopped = await start().generate(replace(REQUEST, stop_token_ids=(stop,)))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids.tolist() == written.token_ids[: written.token_ids.tolist().index(stop) + 1].tolist()
    ending = start(replace(FAST, text=replace(TEXT, end_rate=0.05)))
    requests = [replace(REQUEST, prefix=np.array([first], np.int32), max_tokens=1000) for first in range(200)]
    texts = await asyncio.gather(*map(ending.generate, requests))
    assert all(text.token_ids[-1] == EOS_TOKEN_ID and text.finish_reason == "stop" for text in texts)
    assert np.mean([len(text) for text in texts]) == pytest.approx(20.0, rel=0.25)


async def test_tokens_are_drawn_from_the_rows() -> None:
    """Each token's probability is uniform over (0, its list's mass) if it was drawn from the list: compare means."""
    engine = start()
    request = replace(REQUEST, max_tokens=2000)
    written = await engine.generate(request)
    p = np.exp(written.top.logprobs.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    assert np.mean(written.top.rank_of(written.token_ids) == 0) == pytest.approx(p[:, 0].mean(), abs=0.04)
    nucleus = await engine.generate(replace(request, top_p=0.5))
    before = np.concatenate([np.zeros((2000, 1)), p.cumsum(axis=1)], axis=1)
    ranks = nucleus.top.rank_of(nucleus.token_ids)
    assert (before[np.arange(2000), ranks] < 0.5).all()
    greedy = await engine.generate(replace(request, temperature=0.0))
    assert (greedy.token_ids == greedy.top.token_ids[:, 0]).all()


async def test_excluded_tokens_are_never_written() -> None:
    engine = start()
    listed = tuple((await engine.generate(REQUEST)).top.token_ids[0].tolist())
    for excluded in (listed[:3], listed, tuple(range(50))):
        written = await engine.generate(replace(REQUEST, excluded_token_ids=excluded))
        assert not np.isin(written.token_ids, excluded).any()


async def test_a_student_differs_from_its_teacher_in_spikes() -> None:
    text = ImitatedText(vocabulary_size=30_000)
    request = replace(REQUEST, max_tokens=2000)
    rows: list[TopLogprobs] = []
    for spike_rate in (None, 0.05):
        speeds = replace(FAST, text=replace(text, spike_rate=spike_rate))
        engine = ImitatedEngine(speeds, top_logprobs=64, max_num_seqs=1)
        rows.append((await engine.generate(request)).top)
    nats = compare(rows[0], rows[1], AdaSwitch().divergence).divergences
    assert np.median(nats) < 2e-3
    assert np.mean(nats > 0.5) == pytest.approx(0.05, abs=0.02)


# ------------------------------------------------------------------------------------------------------------ the time


async def test_a_full_batch_is_decoded_at_the_nominal_speed() -> None:
    engine = start(SPEEDS)
    requests = [replace(REQUEST, prefix=np.array([n], np.int32), max_tokens=250) for n in range(32)]  # two batches
    seconds, did = await spent(engine, *map(engine.generate, requests))
    assert did.num_generated_tokens == 32 * 250
    assert did.num_generated_tokens / did.busy_s == pytest.approx(8_000.0, rel=0.02)
    assert 0.98 * did.busy_s < seconds  # real time; the host may be late, the device is not


async def test_reads_run_at_the_nominal_prefill_speed_and_take_turns_with_decoding() -> None:
    engine = start(SPEEDS)
    reads = [ScoreRequest(token_ids=np.arange(n, n + 1000, dtype=np.int32), start=990) for n in range(50)]
    seconds, did = await spent(engine, *map(engine.score, reads))
    assert did.num_prefilled_tokens == 50_000
    assert did.num_prefilled_tokens / did.busy_s == pytest.approx(100_000.0, rel=0.02)
    assert 0.98 * did.busy_s < seconds

    writes = [replace(REQUEST, prefix=np.array([n], np.int32), max_tokens=250) for n in range(16)]
    reads = [ScoreRequest(token_ids=np.arange(n, n + 1000, dtype=np.int32), start=990) for n in range(1000, 1050)]
    _, did = await spent(engine, *map(engine.generate, writes), *map(engine.score, reads))
    assert did.busy_s == pytest.approx(0.5 + 0.5, rel=0.05)


async def test_a_step_over_few_sequences_takes_its_floor() -> None:
    engine = start(SPEEDS)
    _, did = await spent(engine, engine.generate(replace(REQUEST, max_tokens=200)))
    assert did.busy_s == pytest.approx(200 * SPEEDS.step_s(1, 0), rel=0.02)
    assert SPEEDS.step_s(1, 0) == pytest.approx(0.001 + 0.001 / 16)
    assert SPEEDS.step_s(16, 0) == pytest.approx(16 / 8_000)
    assert SPEEDS.step_s(0, 1) == pytest.approx(0.001)
    assert SPEEDS.step_s(16, 1000) == pytest.approx(0.002 + 0.01)


async def test_no_more_sequences_run_than_may() -> None:
    engine = start(SPEEDS, max_num_seqs=2)
    _, did = await spent(engine, *(engine.generate(replace(REQUEST, seed=n, max_tokens=50)) for n in range(4)))
    assert did.busy_s == pytest.approx(2 * 50 * SPEEDS.step_s(2, 0), rel=0.1)


async def test_an_idle_device_is_not_busy() -> None:
    engine = start()
    _, did = await spent(engine, asyncio.sleep(0.02))
    assert did == DeviceCounters()


# ----------------------------------------------------------------------------------------------------------- the cache


async def test_a_cached_prefix_is_not_prefilled_again_but_for_whole_blocks() -> None:
    engine = start()
    _, first = await spent(engine, engine.score(ScoreRequest(token_ids=PREFIX, start=40)))
    assert (first.num_prefilled_tokens, first.num_cached_tokens) == (40, 0)
    longer = np.concatenate([PREFIX, PREFIX])
    _, second = await spent(engine, engine.score(ScoreRequest(token_ids=longer, start=41)))
    assert (second.num_prefilled_tokens, second.num_cached_tokens) == (48, 32)
    other = np.concatenate([PREFIX[::-1], PREFIX])
    _, third = await spent(engine, engine.score(ScoreRequest(token_ids=other, start=41)))
    assert third.num_cached_tokens == 0


async def test_a_read_of_rows_that_the_cache_holds_is_computed_anew() -> None:
    engine = start()
    await engine.score(ScoreRequest(token_ids=PREFIX, start=40))
    _, did = await spent(engine, engine.score(ScoreRequest(token_ids=PREFIX, start=20)))
    assert did.num_prefilled_tokens == 40


async def test_what_was_written_is_cached_but_for_its_last_token() -> None:
    engine = start()
    written = await engine.generate(replace(REQUEST, max_tokens=25))
    text = np.concatenate([PREFIX, written.token_ids])
    _, did = await spent(engine, engine.score(ScoreRequest(token_ids=text, start=65)))
    assert did.num_cached_tokens == 64


def test_the_longest_unused_blocks_are_forgotten_first() -> None:
    cache = PrefixCache(block_tokens=4, max_tokens=8, max_text=100)
    a, b, c = (cache.hashes(np.full(4, n, np.int32)) for n in range(3))
    cache.add(a, 0)
    cache.add(b, 0)
    assert cache.num_cached(a) == 4
    cache.add(c, 0)
    assert [cache.num_cached(text) for text in (a, b, c)] == [4, 0, 4]


# ---------------------------------------------------------------------------------------------- weights, ends, failures


async def test_new_weights_are_another_version_and_an_empty_cache() -> None:
    engine = start()
    await engine.score(ScoreRequest(token_ids=PREFIX, start=40))
    await engine.load_weights(WeightUpdate(version=3))
    _, did = await spent(engine, engine.score(ScoreRequest(token_ids=PREFIX, start=40)))
    assert did.num_cached_tokens == 0
    assert (await engine.generate(REQUEST)).weight_version == 3


async def test_closing_a_stream_ends_its_writing() -> None:
    engine = start(SPEEDS)
    stream = engine.stream(replace(REQUEST, max_tokens=2000))
    await anext(stream)
    assert engine.num_running == 1
    await stream.aclose()
    assert engine.num_running == 0
    await asyncio.sleep(0.01)
    num_written = engine.counters.num_generated_tokens
    await asyncio.sleep(0.01)
    assert engine.counters.num_generated_tokens == num_written < 2000


async def test_a_dropped_request_makes_room_in_the_queue() -> None:
    engine = start(SPEEDS, max_num_seqs=1)
    blocking = engine.stream(replace(REQUEST, max_tokens=2000))
    await anext(blocking)
    waiting = asyncio.create_task(engine.generate(REQUEST))
    last = asyncio.create_task(engine.generate(replace(REQUEST, max_tokens=2)))
    await asyncio.sleep(0.005)
    waiting.cancel()
    await blocking.aclose()
    assert len(await asyncio.wait_for(last, 1.0)) == 2
    assert engine.num_running == 0


@pytest.mark.parametrize("call", ["write", "score"])
async def test_the_call_that_was_chosen_fails_or_hangs_and_no_other(call: str) -> None:
    def ask(engine: ImitatedEngine) -> object:
        return engine.generate(REQUEST) if call == "write" else engine.score(ScoreRequest(token_ids=PREFIX, start=1))

    failing = start(fault=Fault(call=call, number=2))  # type: ignore[arg-type]
    first, second, third = await asyncio.gather(*(ask(failing) for _ in range(3)), return_exceptions=True)  # type: ignore[call-overload]
    assert str(second) == f"{call} 2 fails as scripted"
    assert isinstance(second, ScriptedError)
    assert isinstance(first, Written | TopLogprobs)
    assert isinstance(third, Written | TopLogprobs)
    hanging = start(fault=Fault(call=call, number=1, hangs=True))  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ask(hanging), 0.02)  # type: ignore[arg-type]
    assert hanging.num_running == failing.num_running == 0


async def test_requests_beyond_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="write needs 2049 tokens, the context length is 2048"):
        await start().generate(replace(REQUEST, max_tokens=2009))


async def test_the_controller_writes_mixed_sequences_with_it() -> None:
    text = ImitatedText(vocabulary_size=30_000)
    student, teacher = (
        ImitatedEngine(replace(FAST, text=replace(text, spike_rate=spike_rate)), top_logprobs=32, max_num_seqs=64)
        for spike_rate in (0.01, None)
    )
    controller = SwitchingController(
        student=student,
        teacher=teacher,
        policy=AdaSwitch(floor=0.5),
        sampling=Sampling(max_new_tokens=128, max_in_flight=64),
        top_logprobs=32,
        stop_token_ids=(EOS_TOKEN_ID,),
    )
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(prompt_id=str(n), token_ids=rng.integers(1, 30_000, 20).astype(np.int32), seed=n) for n in range(200)
    ]
    sequences = await sequences_of(controller, prompts, max_in_flight=64)
    switched = np.mean([sequence.first_switch is not None for sequence in sequences])
    assert switched == pytest.approx(1 - 0.99**118, abs=0.12)
    assert student.num_running == teacher.num_running == 0


@pytest.mark.parametrize("policy", [Decay(initial_threshold=0.0, rate=0.0), Relay(top_k=1), AdaSwitch(window=4)])
async def test_a_controller_ends_where_more_sequences_wait_than_both_engines_have_places(policy: Policy) -> None:
    """Whoever holds a place while it waits for another engine's must not hold up who would free that."""
    student_text = replace(TEXT, spike_rate=0.5)
    student, teacher = start(replace(FAST, text=student_text), max_num_seqs=3), start(max_num_seqs=2)
    controller = SwitchingController(
        student=student,
        teacher=teacher,
        policy=policy,
        sampling=Sampling(max_new_tokens=30, chunk_tokens=8, max_in_flight=20),
        top_logprobs=K,
        stop_token_ids=(EOS_TOKEN_ID,),
    )
    prompts = [
        Prompt(prompt_id=str(number), token_ids=np.arange(number, number + 20, dtype=np.int32), seed=number)
        for number in range(40)
    ]
    async with asyncio.timeout(30.0):
        sequences = await sequences_of(controller, prompts, max_in_flight=20)
    assert len(sequences) == 40
    assert sum(sequence.switches.size for sequence in sequences) > 40 or isinstance(policy, AdaSwitch)
