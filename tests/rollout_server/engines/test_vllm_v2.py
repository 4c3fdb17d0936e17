"""The real engine as it runs on GPUs, on a processor: Model Runner V2 (its kernels in torch), asynchronous scheduling,
prompts in pieces. Held against Hugging Face as ``test_vllm`` does with V1.
"""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
import torch
from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from common.sequence import Ids
from rollout_server.engines.protocol import EngineSpec, ScoreRequest, WriteRequest, concatenate_written
from rollout_server.engines.selftest import check_engine
from rollout_server.engines.vllm import VLLMEngine
from tests.support.streams import pieces_of
from tests.support.v2_engine import BLOCK, start_v2_engine
from trainer.weight_sender import LearnerWeights, OneCallClient, build_sender

VOCABULARY_SIZE = 32
CONTEXT = 128
PIECE = 40  # tokens a step computes at most
EOS_ID = 2
TOLERANCE = 5e-4  # nats, as in test_vllm

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(make_spec: Callable[[str], EngineSpec]) -> AsyncIterator[VLLMEngine]:
    """The demo's teacher, with a cache of some 700 tokens."""
    spec = make_spec("teacher")
    spec = replace(
        spec,
        settings=spec.settings.model_copy(update={"kv_cache_gib": 0.002, "max_model_len": CONTEXT, "max_num_seqs": 32}),
        weight_transfer_backend="host_memory",
    )
    engine = start_v2_engine(spec, max_num_batched_tokens=PIECE)
    yield engine
    engine.shutdown()


def random_text(num_tokens: int, *, seed: int) -> Ids:
    return np.random.default_rng(seed).integers(4, 19, num_tokens).astype(np.int32)


def write_request(prefix: Ids, **settings: object) -> WriteRequest:
    defaults = {"max_tokens": 64, "temperature": 0.0, "top_p": 1.0, "seed": 0, "chunk_tokens": 16}
    return WriteRequest(prefix=prefix, **(defaults | settings))


async def ask_vllm(engine: VLLMEngine, text: Ids, request_id: str) -> RequestOutput:
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


async def test_the_self_test_passes(engine) -> None:
    await check_engine(
        engine, name="teacher", prefix=random_text(20, seed=1), top_logprobs=VOCABULARY_SIZE, dtype="float32"
    )


@pytest.mark.parametrize("num_cached", [0, BLOCK, 2 * BLOCK, 4 * BLOCK])
async def test_scores_are_hugging_face_s_rows_whatever_is_cached(
    num_cached, engine, models, true_rows, largest_difference
) -> None:
    """The last of them is the whole text but its last token, which vLLM always computes."""
    text = random_text(4 * BLOCK + 1, seed=10 + num_cached)
    expected = true_rows(models.teacher, text)
    if num_cached:
        await engine.generate(write_request(text[:num_cached], max_tokens=1))
    raw = await ask_vllm(engine, text, f"raw-{num_cached}")
    assert raw.num_cached_tokens == num_cached
    assert len(raw.prompt_logprobs) == text.size - num_cached, "V2 returns rows of computed tokens alone"
    await engine._llm.reset_prefix_cache()

    for start in (1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 4 * BLOCK, 4 * BLOCK + 1):
        if num_cached:
            await engine.generate(write_request(text[:num_cached], max_tokens=1))
        rows = await engine.score(ScoreRequest(token_ids=text, start=start))
        assert largest_difference(rows, expected[start - 1 :]) < TOLERANCE
        await engine._llm.reset_prefix_cache()


async def test_many_scores_at_once_in_pieces_get_their_own_rows(engine, models, true_rows, largest_difference) -> None:
    texts = [random_text(20 + 2 * seed, seed=1000 + seed % 20) for seed in range(50)]
    starts = [1 + 5 * (number % 4) for number in range(50)]
    others = [engine.generate(write_request(text[:15], temperature=1.0, seed=1)) for text in texts[:8]]
    requests = [ScoreRequest(token_ids=text, start=start) for text, start in zip(texts, starts, strict=True)]
    scores, _ = await asyncio.gather(asyncio.gather(*map(engine.score, requests)), asyncio.gather(*others))
    for text, start, rows in zip(texts, starts, scores, strict=True):
        assert largest_difference(rows, true_rows(models.teacher, text)[start - 1 :]) < TOLERANCE


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_written_rows_are_hugging_face_s(
    temperature, engine, models, true_rows, largest_difference, held_out_prompts
) -> None:
    for seed in range(8):
        prompt = held_out_prompts[seed].token_ids
        written = await engine.generate(write_request(prompt, temperature=temperature, seed=seed))
        expected = true_rows(models.teacher, np.concatenate([prompt, written.token_ids]))[prompt.size - 1 : -1]
        assert largest_difference(written.top, expected) < TOLERANCE
        np.testing.assert_array_equal(written.logprobs, written.top.logprob_of(written.token_ids))
        if temperature == 0.0:
            np.testing.assert_array_equal(written.token_ids, expected.argmax(axis=1))
        assert (written.finish_reason == "stop") == (written.token_ids[-1] == EOS_ID)
        assert EOS_ID not in written.token_ids[:-1]


async def test_the_same_seed_writes_the_same_tokens_alone_and_in_a_crowd(engine, held_out_prompts) -> None:
    prefix = held_out_prompts[2].token_ids

    async def write(seed: int) -> list[int]:
        return (await engine.generate(write_request(prefix, temperature=2.0, seed=seed))).token_ids.tolist()

    alone = await write(7)
    crowd = await asyncio.gather(*map(write, range(24)))
    assert crowd[7] == alone
    assert len({tuple(token_ids) for token_ids in crowd}) > 12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("turns", [[4, 5], [1] * 23])
async def test_pauses_change_no_token_and_hand_over_what_is_written(
    temperature, turns, engine, held_out_prompts
) -> None:
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
    np.testing.assert_array_equal(paused.token_ids, whole.token_ids)
    np.testing.assert_allclose(paused.logprobs, whole.logprobs, atol=TOLERANCE)


async def test_in_a_full_cache_all_write_what_they_write_alone(engine) -> None:
    """vLLM interrupts those without pauses, and never a session."""
    lengths = [1, BLOCK, 0]  # of a turn; 0 for no pauses

    async def write(seed: int) -> list[int]:
        prefix = random_text(BLOCK + 1, seed=seed)
        request = write_request(prefix, max_tokens=60, temperature=1.0, seed=seed, chunk_tokens=32, ignore_eos=True)
        length = lengths[seed % 3]
        pieces = await pieces_of(engine, request, [length] * 60 if length else [])
        return concatenate_written(pieces).token_ids.tolist()

    async with asyncio.timeout(100.0):
        crowd = await asyncio.gather(*map(write, range(12)))
    assert {len(token_ids) for token_ids in crowd} == {60}
    assert [await write(seed) for seed in range(3)] == crowd[:3]


async def test_a_slow_consumer_gets_the_rows_a_quick_one_gets(engine, held_out_prompts) -> None:
    request = write_request(held_out_prompts[0].token_ids, temperature=2.0, seed=4, chunk_tokens=2)
    quick = concatenate_written([piece async for piece in engine.stream(request)])
    slow_pieces = []
    async with aclosing(engine.stream(request)) as stream:
        async for piece in stream:
            slow_pieces.append(piece)
            await asyncio.sleep(0.2)
    slow = concatenate_written(slow_pieces)
    np.testing.assert_array_equal(slow.token_ids, quick.token_ids)
    np.testing.assert_allclose(slow.top.logprobs, quick.top.logprobs, atol=1e-5)
    np.testing.assert_allclose(slow.logprobs, quick.logprobs, atol=1e-5)


async def test_closed_streams_end_in_the_engine(engine, held_out_prompts) -> None:
    async def take_one(seed: int, pause_after: int | None) -> None:
        request = write_request(held_out_prompts[seed].token_ids, temperature=2.0, seed=seed, chunk_tokens=1)
        async with aclosing(engine.stream(replace(request, pause_after=pause_after))) as pieces:
            await anext(pieces)

    await asyncio.gather(*(take_one(seed, (None, 1, 2)[seed % 3]) for seed in range(21)))
    assert engine.num_running == 0
    async with asyncio.timeout(10.0):
        while not await engine._llm.reset_prefix_cache():
            await asyncio.sleep(0.05)


async def test_a_text_without_the_excluded_tokens(engine, held_out_prompts) -> None:
    prefix = held_out_prompts[0].token_ids
    usual = await engine.generate(write_request(prefix))
    excluded = tuple(set(usual.token_ids[:3].tolist()))
    written = await engine.generate(write_request(prefix, excluded_token_ids=excluded))
    assert not set(excluded) & set(written.token_ids.tolist())


async def test_new_weights_are_taken_between_two_steps_and_old_caches_are_not_read(
    engine, models, true_rows, largest_difference
) -> None:
    """Last, for it leaves the engine with them. Requests in flight go on under the new weights, and are read again."""
    model = copy.deepcopy(models.teacher)
    loop = asyncio.get_running_loop()

    def in_loop(call: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(call, loop).result(60.0)

    client = OneCallClient(
        init=lambda info: in_loop(engine.init_weight_transfer(info)),
        load=lambda update: in_loop(engine.load_weights(update)),
    )
    sender = await asyncio.to_thread(build_sender, "host_memory", LearnerWeights(model, dtype=torch.float32), client)
    try:
        text, prefix = random_text(70, seed=3000), random_text(3 * BLOCK, seed=3001)
        await engine.score(ScoreRequest(token_ids=text, start=1))
        request = write_request(prefix, max_tokens=70, chunk_tokens=1, ignore_eos=True)
        pieces = []
        async with aclosing(engine.stream(request)) as stream:
            async for piece in stream:
                pieces.append(piece)
                if len(pieces) == 5:
                    torch.manual_seed(0)
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter += 0.05 * torch.randn_like(parameter)
                    await asyncio.to_thread(sender.send, 1)
        rows = await engine.score(ScoreRequest(token_ids=text, start=1))
        assert largest_difference(rows, true_rows(model, text)) < TOLERANCE
        written = concatenate_written(pieces)
        new_rows = true_rows(model, np.concatenate([prefix, written.token_ids]))[prefix.size - 1 : -1]
        old_rows = true_rows(models.teacher, np.concatenate([prefix, written.token_ids]))[prefix.size - 1 : -1]
        assert largest_difference(written.top[:5], old_rows[:5]) < TOLERANCE
        assert largest_difference(written.top[-20:], new_rows[-20:]) < TOLERANCE
        assert largest_difference(written.top[-20:], old_rows[-20:]) > 0.1
    finally:
        await asyncio.to_thread(sender.shutdown)
