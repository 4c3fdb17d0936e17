"""The real engine: the demo's teacher and student in vLLM, held against Hugging Face. Nothing is patched."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from common.config import AdaSwitch, OnPolicy, Policy, Sampling, Trainer
from common.sequence import Ids, MixedSequence, TopLogprobs
from rollout_server.controller import SwitchingController
from rollout_server.engines.protocol import EngineSpec, ScoreRequest, WriteRequest, Written, concatenate_written
from rollout_server.engines.vllm import VLLMEngine
from tests.support.streams import sequences_of
from trainer.learner import Learner
from trainer.weight_sender import LearnerWeights, OneCallClient, WeightSender, build_sender

VOCABULARY_SIZE = 32
CONTEXT = 128
BLOCK = 16  # tokens; the engine's on a processor
SMALL_CACHE_BLOCKS = 43
EOS_ID, SEMICOLON_ID = 2, 18
TOLERANCE = 5e-4  # nats; on random texts float32 rounding alone is 2e-4 in Hugging Face, and a wrong row is off by 0.1

pytestmark = pytest.mark.asyncio(loop_scope="session")


def random_text(num_tokens: int, *, seed: int) -> Ids:
    """A text of the demo's symbols that no other seed shares a first block with, so that it isn't cached yet."""
    return np.random.default_rng(seed).integers(4, 19, num_tokens).astype(np.int32)


def write_request(
    prefix: Ids,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chunk_tokens: int = 16,
    stop_token_ids: tuple[int, ...] = (),
) -> WriteRequest:
    return WriteRequest(
        prefix=prefix,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=1.0,
        seed=seed,
        chunk_tokens=chunk_tokens,
        stop_token_ids=stop_token_ids,
    )


async def ask_vllm(engine: VLLMEngine, text: Ids, request_id: str) -> RequestOutput:
    """What vLLM itself answers when it may read its prefix cache and is asked for the prompt's log-probs."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=VOCABULARY_SIZE,
        flat_logprobs=True,
        detokenize=False,
        skip_reading_prefix_cache=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompt = TokensPrompt(prompt_token_ids=text.tolist())
    return [output async for output in engine._llm.generate(prompt, params, request_id)][-1]


async def test_no_engine_would_take_pickled_weights(engines) -> None:
    for engine in (engines.student, engines.teacher):
        assert engine._llm.vllm_config.load_config.load_format == "safetensors"
        assert not engine._llm.vllm_config.model_config.trust_remote_code


async def test_vllm_s_own_processes_alone_keep_to_the_cores_of_the_settings(engines) -> None:
    everywhere = os.sched_getaffinity(0)
    cores = {process.cmdline()[0]: set(process.cpu_affinity()) for process in psutil.Process().children(recursive=True)}
    assert cores["student::EngineCore"] == {max(everywhere)}
    assert cores["teacher::EngineCore"] == everywhere
    assert not [title for title in cores if "::Worker" in title], "the engine's process runs the model"


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("start", [1, 2, 20, BLOCK - 1, BLOCK, BLOCK + 1, 69, 70])
async def test_scores_are_hugging_face_s_rows_from_any_start_and_whatever_is_cached(
    start, engines, models, true_rows, largest_difference
) -> None:
    text = random_text(70, seed=start)
    expected = true_rows(models.teacher, text)[start - 1 :]
    request = ScoreRequest(token_ids=text, start=start)
    cold = await engines.teacher.score(request)
    warm = await engines.teacher.score(request)
    assert largest_difference(cold, expected) < TOLERANCE
    assert largest_difference(warm, expected) < TOLERANCE


async def test_many_scores_at_once_get_their_own_rows(engines, models, true_rows, largest_difference) -> None:
    texts = [random_text(20 + seed, seed=1000 + seed) for seed in range(60)]
    scores = await asyncio.gather(
        *(engines.teacher.score(ScoreRequest(token_ids=text, start=1 + i % 20)) for i, text in enumerate(texts))
    )
    for i, (text, rows) in enumerate(zip(texts, scores, strict=True)):
        assert largest_difference(rows, true_rows(models.teacher, text)[i % 20 :]) < TOLERANCE


async def test_a_needed_row_that_the_cache_holds_is_read_anew(engines, models, true_rows, largest_difference) -> None:
    """vLLM's own rows of cached tokens are what lay in memory; ours are the model's."""
    text = random_text(70, seed=2000)
    expected = true_rows(models.teacher, text)
    await engines.teacher.score(ScoreRequest(token_ids=text, start=1))
    other_text = random_text(70, seed=2001)  # leaves its rows in the memory that vLLM uses again
    await engines.teacher.score(ScoreRequest(token_ids=other_text, start=1))

    raw = await ask_vllm(engines.teacher, text, "raw-whole")
    assert raw.num_cached_tokens == 4 * BLOCK
    assert len(raw.prompt_logprobs) == text.size, "V1 returns a row for every token, whatever is in it"
    own_logprobs = np.array(raw.prompt_logprobs.logprobs)[raw.prompt_logprobs.start_indices[1:]]  # of tokens 1..69
    differences = np.abs(own_logprobs - expected[np.arange(69), text[1:]])
    assert differences[: 4 * BLOCK].max() > 0.1, "the trap is gone: rows of cached tokens are right in vLLM itself"
    assert differences[4 * BLOCK :].max() < TOLERANCE

    rows = await engines.teacher.score(ScoreRequest(token_ids=text, start=1))
    assert largest_difference(rows, expected) < TOLERANCE


@pytest.mark.parametrize("num_blocks", [1, 2])
async def test_a_prompt_that_ends_on_a_block_border_and_was_cached_by_a_sibling(
    num_blocks, engines, models, true_rows, largest_difference
) -> None:
    border = num_blocks * BLOCK
    text = random_text(border + 10, seed=3000 + num_blocks)
    prompt, expected = text[:border], true_rows(models.teacher, text)
    await engines.teacher.generate(write_request(prompt, max_tokens=4))  # the sibling
    raw = await ask_vllm(engines.teacher, text, f"raw-border-{num_blocks}")
    assert raw.num_cached_tokens == border, "the row of the first new token must be one that the cache holds"

    first_new = await engines.teacher.score(ScoreRequest(token_ids=text, start=border))
    assert largest_difference(first_new, expected[border - 1 :]) < TOLERANCE
    to_come = await engines.teacher.score(ScoreRequest(token_ids=prompt, start=border))
    assert largest_difference(to_come, expected[border - 1 : border]) < TOLERANCE
    after = await engines.teacher.score(ScoreRequest(token_ids=text, start=border + 1))
    assert largest_difference(after, expected[border:]) < TOLERANCE


async def test_the_longest_text_that_can_be_scored_leaves_room_for_the_token_to_come(
    engines, models, true_rows, largest_difference
) -> None:
    text = random_text(CONTEXT, seed=4000)
    rows = await engines.student.score(ScoreRequest(token_ids=text[:-1], start=1))
    assert largest_difference(rows, true_rows(models.student, text[:-1])) < TOLERANCE
    with pytest.raises(
        VLLMValidationError, match=rf"length {CONTEXT}\) plus .* is longer than the maximum model length"
    ):
        await engines.student.score(ScoreRequest(token_ids=text, start=1))


async def test_a_list_shorter_than_the_vocabulary_holds_the_best(
    engines, models, true_rows, largest_difference
) -> None:
    engine, k = VLLMEngine(engines.student._llm, top_logprobs=5), 5
    assert engine.facts.top_logprobs == k
    text = random_text(40, seed=5000)
    scores = await engine.score(ScoreRequest(token_ids=text, start=20))
    expected = true_rows(models.student, text)[19:]
    assert scores.k == k
    assert largest_difference(scores, expected) < TOLERANCE
    assert np.abs(scores.logprobs + np.sort(-expected, axis=1)[:, :k]).max() < TOLERANCE


async def test_a_token_outside_its_list_has_its_own_logprob(
    engines, models, true_rows, largest_difference, held_out_prompts
) -> None:
    engine, k = VLLMEngine(engines.student._llm, top_logprobs=2), 2
    num_outside = 0
    for seed in range(8):
        prefix = held_out_prompts[seed].token_ids
        written = await engine.generate(write_request(prefix, temperature=2.0, seed=seed))
        expected = true_rows(models.student, np.concatenate([prefix, written.token_ids]))[prefix.size - 1 : -1]
        assert largest_difference(written.top, expected) < TOLERANCE
        own = expected[np.arange(len(written)), written.token_ids]
        assert np.abs(written.logprobs - own).max() < TOLERANCE
        num_outside += int((written.top.rank_of(written.token_ids) == k).sum())
    assert num_outside > 0


# ------------------------------------------------------------------------------------------------------------- streams


async def test_written_rows_are_hugging_face_s(
    engines, models, true_rows, largest_difference, held_out_prompts
) -> None:
    prompt = held_out_prompts[0].token_ids
    written = await engines.student.generate(write_request(prompt, temperature=1.0))
    expected = true_rows(models.student, np.concatenate([prompt, written.token_ids]))[prompt.size - 1 : -1]
    assert largest_difference(written.top, expected) < TOLERANCE
    assert np.array_equal(written.logprobs, written.top.logprob_of(written.token_ids))


async def collect_pieces(pieces: AsyncIterator[Written], *, pause_s: float) -> list[Written]:
    taken = []
    async for piece in pieces:
        taken.append(piece)
        await asyncio.sleep(pause_s)
    return taken


@pytest.mark.parametrize("k", [3, VOCABULARY_SIZE])
async def test_a_slow_consumer_gets_the_rows_a_quick_one_gets(k, engines, held_out_prompts) -> None:
    """vLLM merges what waits to be taken, and then lists a token that is its own alternative once."""
    engine = VLLMEngine(engines.student._llm, top_logprobs=k)
    request = write_request(held_out_prompts[0].token_ids, temperature=2.0, seed=4, chunk_tokens=2)
    quick_pieces = await collect_pieces(engine.stream(request), pause_s=0.0)
    slow_pieces = await collect_pieces(engine.stream(request), pause_s=0.05)
    quick, slow = concatenate_written(quick_pieces), concatenate_written(slow_pieces)
    assert max(map(len, slow_pieces)) > max(map(len, quick_pieces)), "nothing was merged: pause for longer"
    assert np.array_equal(slow.token_ids, quick.token_ids)
    assert slow.finish_reason == quick.finish_reason
    assert np.allclose(slow.logprobs, quick.logprobs, atol=1e-5)
    assert np.allclose(slow.top.logprobs, quick.top.logprobs, atol=1e-5)
    assert np.allclose(slow.top.logprobs, np.take_along_axis(*whole_rows(quick.top, slow.top), axis=1), atol=1e-5)


def whole_rows(known: TopLogprobs, wanted: TopLogprobs) -> tuple[np.ndarray, np.ndarray]:
    """``known`` as [n, V] with nan where nothing is listed, and the ids of ``wanted``: arguments of take_along_axis."""
    rows = np.full((len(known), VOCABULARY_SIZE), np.nan)
    np.put_along_axis(rows, known.token_ids, known.logprobs, axis=1)
    return rows, wanted.token_ids


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 64])
async def test_pieces_end_where_the_text_is_a_multiple_of_the_chunk_and_only_the_last_has_a_finish_reason(
    chunk_tokens, engines, held_out_prompts
) -> None:
    prefix = held_out_prompts[1].token_ids
    request = write_request(prefix, chunk_tokens=chunk_tokens)
    pieces = [piece async for piece in engines.teacher.stream(request)]
    ends = prefix.size + np.cumsum([len(piece) for piece in pieces])
    assert (ends[:-1] % chunk_tokens == 0).all()
    assert len(pieces) >= 3 or chunk_tokens > 7
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    whole = await engines.teacher.generate(write_request(prefix, chunk_tokens=128))
    written = concatenate_written(pieces)
    assert np.array_equal(written.token_ids, whole.token_ids)
    assert np.allclose(written.top.logprobs, whole.top.logprobs, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("turns", [[1], [4, 5], [1] * 23, [20]])
async def test_pauses_change_no_token_and_hand_over_what_is_written(
    temperature, turns, engines, held_out_prompts, pieces_of
) -> None:
    engine = engines.student
    request = write_request(
        held_out_prompts[0].token_ids, max_tokens=24, temperature=temperature, seed=11, chunk_tokens=32
    )
    whole = await engine.generate(request)
    others = [engine.generate(write_request(prompt.token_ids, seed=1)) for prompt in held_out_prompts[1:8]]
    crowd = asyncio.gather(*others)
    pieces = await pieces_of(engine, request, turns)
    await crowd
    ends = [end for end in (*np.cumsum(turns).tolist(), 24) if end < len(whole)]
    assert np.cumsum([len(piece) for piece in pieces]).tolist() == [*ends, len(whole)]
    paused = concatenate_written(pieces)
    assert paused.finish_reason == whole.finish_reason
    assert {piece.finish_reason for piece in pieces[:-1]} <= {None}
    np.testing.assert_array_equal(paused.token_ids, whole.token_ids)
    np.testing.assert_allclose(paused.logprobs, whole.logprobs, atol=TOLERANCE)


async def test_a_paused_stream_writes_nothing_until_it_is_asked_and_ends_when_closed(engines, held_out_prompts) -> None:
    engine = engines.teacher
    request = replace(write_request(held_out_prompts[0].token_ids), pause_after=2)
    async with aclosing(engine.stream(request)) as stream:
        assert len(await anext(stream)) == 2
        assert engine.num_running == 1
    while engine.num_running:
        await asyncio.sleep(0.01)


async def test_the_same_seed_writes_the_same_tokens_alone_and_in_a_crowd(engines, held_out_prompts) -> None:
    prefix = held_out_prompts[2].token_ids

    async def write(seed: int) -> list[int]:
        written = await engines.student.generate(write_request(prefix, temperature=2.0, seed=seed))
        return [*written.token_ids.tolist()]

    alone = await write(7)
    crowd = await asyncio.gather(*map(write, range(24)))
    assert crowd[7] == alone
    assert len({tuple(token_ids) for token_ids in crowd}) > 12, "different seeds must write differently"


async def test_the_end_of_sequence_token_is_written_and_is_why_it_stopped(engines, held_out_prompts) -> None:
    written = await engines.teacher.generate(write_request(held_out_prompts[3].token_ids))
    assert written.finish_reason == "stop"
    assert written.token_ids[-1] == EOS_ID
    assert EOS_ID not in written.token_ids[:-1]
    exact = await engines.teacher.generate(write_request(held_out_prompts[3].token_ids, max_tokens=len(written)))
    assert exact.finish_reason == "stop", "the end of the sequence comes before the limit"
    short = await engines.teacher.generate(write_request(held_out_prompts[3].token_ids, max_tokens=len(written) - 1))
    assert short.finish_reason == "length"
    assert np.array_equal(short.token_ids, written.token_ids[:-1])


async def test_a_stop_token_of_the_other_model_is_written_and_ends_the_text(engines, held_out_prompts) -> None:
    prefix = held_out_prompts[4].token_ids
    written = await engines.teacher.generate(write_request(prefix, stop_token_ids=(SEMICOLON_ID,)))
    assert written.finish_reason == "stop"
    assert written.token_ids.tolist().index(SEMICOLON_ID) == len(written) - 1


async def test_what_the_context_has_no_room_for_is_not_written(engines) -> None:
    written = await engines.teacher.generate(write_request(random_text(CONTEXT - 3, seed=6000), temperature=2.0))
    assert len(written) <= 3


# ------------------------------------------------------------------------------------------------ ends that come early


async def all_blocks_are_free(engine: VLLMEngine) -> bool:
    """Whether no request holds any of the engine's memory: only then vLLM clears its prefix cache."""
    for _ in range(100):
        if await engine._llm.reset_prefix_cache():
            return True
        await asyncio.sleep(0.05)
    return False


async def test_a_closed_stream_ends_in_the_engine(engines, held_out_prompts) -> None:
    engine = engines.student

    async def take_one(seed: int) -> None:
        request = write_request(held_out_prompts[seed].token_ids, temperature=2.0, seed=seed, chunk_tokens=1)
        async with aclosing(engine.stream(request)) as pieces:
            async for _ in pieces:
                break

    await asyncio.gather(*map(take_one, range(20)))
    assert engine.num_running == 0
    assert await all_blocks_are_free(engine)


async def test_a_cancelled_call_ends_in_the_engine(engines, held_out_prompts) -> None:
    engine = engines.student
    requests = [
        write_request(prompt.token_ids, max_tokens=100, temperature=2.0, seed=1) for prompt in held_out_prompts[:20]
    ]
    calls = [asyncio.create_task(engine.generate(request)) for request in requests]
    calls += [
        asyncio.create_task(engine.score(ScoreRequest(token_ids=request.prefix, start=1))) for request in requests
    ]
    while engine.num_running < len(calls) / 2:
        await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert any(call.cancelled() for call in calls)
    assert engine.num_running == 0
    assert await all_blocks_are_free(engine)


async def test_a_prompt_too_long_for_the_context_is_refused_and_the_engine_lives_on(engines, held_out_prompts) -> None:
    too_long = random_text(CONTEXT + 72, seed=7000)
    message = rf"maximum context length is {CONTEXT} tokens.* your prompt contains {CONTEXT + 72} input tokens"
    with pytest.raises(VLLMValidationError, match=message):
        await engines.teacher.generate(write_request(too_long))
    with pytest.raises(VLLMValidationError, match=message):
        await engines.teacher.score(ScoreRequest(token_ids=too_long, start=1))
    assert engines.teacher.num_running == 0
    written = await engines.teacher.generate(write_request(held_out_prompts[0].token_ids))
    assert written.finish_reason == "stop"


# ------------------------------------------------------------------------------------------------------- equal models


async def write_with_itself(engine: VLLMEngine, prompts, policy: Policy, *, temperature: float) -> list[MixedSequence]:
    controller = SwitchingController(
        student=engine,
        teacher=engine,
        policy=policy,
        sampling=Sampling(temperature=temperature, max_new_tokens=64, chunk_tokens=8),
        top_logprobs=VOCABULARY_SIZE,
        stop_token_ids=(EOS_ID,),
    )
    return await sequences_of(controller, prompts)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_student_that_is_its_teacher_never_switches_and_has_no_loss(
    temperature, engines, held_out_prompts, demo_folder
) -> None:
    # Above rounding: with a floor of 0 the rule would compare one rounding error with the mean of the last ten.
    policy = AdaSwitch(floor=1e-4)
    sequences = await write_with_itself(engines.student, held_out_prompts[:64], policy, temperature=temperature)
    assert not any(sequence.switches.size for sequence in sequences)
    divergences = np.concatenate([sequence.divergences for sequence in sequences])
    print(f"largest divergence {divergences.max():.2g} nats")
    assert divergences.max() < 1e-5
    learner = Learner(str(demo_folder / "models" / "student"), Trainer(), seed=0)
    report = learner.step(sequences)
    print(f"loss {report.loss:.2g} nats, grad_norm {report.grad_norm:.2g}")
    assert report.loss == pytest.approx(0.0, abs=1e-5)


async def test_on_policy_with_itself_is_the_student_alone(engines, held_out_prompts) -> None:
    prompts = held_out_prompts[:16]
    sequences = await write_with_itself(engines.student, prompts, OnPolicy(), temperature=0.0)
    alone = await asyncio.gather(*(engines.student.generate(write_request(prompt.token_ids)) for prompt in prompts))
    by_id = {sequence.sequence_id: sequence for sequence in sequences}
    for prompt, written in zip(prompts, alone, strict=True):
        assert np.array_equal(by_id[prompt.sequence_id].token_ids, written.token_ids)
        assert by_id[prompt.sequence_id].finish_reason == written.finish_reason


# ----------------------------------------------------------------------------------------------- an engine that is full


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def small_engine(make_spec: Callable[[str], EngineSpec]) -> AsyncIterator[VLLMEngine]:
    """A cache of some 700 tokens, in which five of the texts below find room."""
    spec = make_spec("teacher")
    spec = replace(
        spec,
        settings=spec.settings.model_copy(
            update={"max_model_len": CONTEXT, "vllm": {"num_gpu_blocks_override": SMALL_CACHE_BLOCKS}}
        ),
        weight_transfer_backend="host_memory",
    )
    engine = VLLMEngine.start(spec)
    assert engine._llm.vllm_config.cache_config.num_gpu_blocks == SMALL_CACHE_BLOCKS, "passed through to vLLM"
    yield engine
    engine.shutdown()


@pytest.mark.parametrize("num_tokens", [1, BLOCK])
async def test_more_paused_streams_than_the_cache_has_room_for_all_end(num_tokens, small_engine, pieces_of) -> None:
    """vLLM takes no cache from a session between two turns: let in all at once, they wait for each other for ever."""

    async def write(seed: int) -> int:
        request = write_request(random_text(BLOCK + 1, seed=seed), max_tokens=100, temperature=1.0, seed=seed)
        pieces = await pieces_of(small_engine, replace(request, ignore_eos=True), [num_tokens] * 100)
        return sum(map(len, pieces))

    async with asyncio.timeout(120.0):
        assert await asyncio.gather(*map(write, range(12))) == [100] * 12


async def test_new_weights_wait_for_the_paused_streams_and_the_next_ones_for_them(small_engine, models) -> None:
    loop = asyncio.get_running_loop()

    def open_sender() -> WeightSender:
        def in_loop(call) -> None:
            asyncio.run_coroutine_threadsafe(call, loop).result(60.0)

        client = OneCallClient(
            init=lambda transfer_info: in_loop(small_engine.init_weight_transfer(transfer_info)),
            load=lambda update: in_loop(small_engine.load_weights(update)),
        )
        return build_sender("host_memory", LearnerWeights(models.teacher, dtype=torch.float32), client)

    sender = await asyncio.to_thread(open_sender)
    request = replace(write_request(random_text(20, seed=99)), pause_after=2)
    try:
        async with aclosing(small_engine.stream(request)) as stream:
            assert (await anext(stream)).weight_version == 0
            sending = asyncio.create_task(asyncio.to_thread(sender.send, 1))
            await asyncio.sleep(0.5)
            assert not sending.done()
            later = asyncio.create_task(small_engine.generate(request))
        await sending
        assert (await later).weight_version == 1
    finally:
        await asyncio.to_thread(sender.shutdown)
