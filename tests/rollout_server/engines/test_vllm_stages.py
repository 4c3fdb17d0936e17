"""An engine that is set up otherwise than most: two pipeline stages, and an argument passed through to vLLM."""

import asyncio
from collections.abc import AsyncIterator
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
import torch

from common.sequence import Ids
from rollout_server.engines.protocol import ScoreRequest, WriteRequest
from rollout_server.engines.vllm import VLLMEngine
from trainer.weight_sender import LearnerWeights, OneCallClient, WeightSender, build_sender

TOLERANCE = 5e-4  # nats, as in ``test_vllm``

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def staged_engine(make_spec) -> AsyncIterator[VLLMEngine]:
    spec = make_spec("teacher")
    settings = spec.settings.model_copy(
        update={"pipeline_parallel_size": 2, "max_num_seqs": 16, "vllm": {"block_size": 32}}
    )
    spec = replace(spec, settings=settings, weight_transfer_backend="host_memory")
    engine = await asyncio.to_thread(VLLMEngine.start, spec)
    yield engine
    engine.shutdown()


def a_text(*, seed: int, num_tokens: int = 80) -> Ids:
    return np.random.default_rng(seed).integers(4, 19, num_tokens).astype(np.int32)


async def test_an_argument_passed_through_is_in_effect(staged_engine) -> None:
    assert staged_engine._llm.vllm_config.cache_config.block_size == 32
    text = a_text(seed=1)
    await staged_engine.score(ScoreRequest(token_ids=text[:70], start=70))
    output = await staged_engine._read(ScoreRequest(token_ids=text, start=70), skip_cache=False)
    assert output.num_cached_tokens == 64  # whole blocks: of 16 tokens it would be the same, of 32 no less


async def test_stages_of_layers_score_and_write_as_the_whole_model_does(
    staged_engine, models, true_rows, largest_difference
) -> None:
    text = a_text(seed=2)
    rows = await staged_engine.score(ScoreRequest(token_ids=text, start=1))
    assert largest_difference(rows, true_rows(models.teacher, text)) < TOLERANCE
    request = WriteRequest(prefix=text[:15], max_tokens=20, temperature=0.0, top_p=1.0, seed=0, chunk_tokens=16)
    written = await staged_engine.generate(request)
    whole = np.concatenate([text[:15], written.token_ids])
    expected = true_rows(models.teacher, whole)[14:-1].argmax(axis=1)
    assert written.token_ids.tolist() == expected.tolist()


async def test_new_weights_reach_every_stage(staged_engine, models, true_rows, largest_difference) -> None:
    """Each worker holds some layers, and takes only their tensors from a file with all."""
    changed = deepcopy(models.teacher)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.0 + 0.1 * torch.randn(parameter.shape, generator=noise))
    loop = asyncio.get_running_loop()

    def open_sender() -> WeightSender:
        def in_loop(call) -> None:
            asyncio.run_coroutine_threadsafe(call, loop).result(60.0)

        client = OneCallClient(
            init=lambda transfer_info: in_loop(staged_engine.init_weight_transfer(transfer_info)),
            load=lambda update: in_loop(staged_engine.load_weights(update)),
        )
        return build_sender("host_memory", LearnerWeights(changed, dtype=torch.float32), client)

    sender = await asyncio.to_thread(open_sender)
    try:
        await asyncio.to_thread(sender.send, 1)
        text = a_text(seed=3)
        rows = await staged_engine.score(ScoreRequest(token_ids=text, start=1))
        assert largest_difference(rows, true_rows(models.teacher, text)) > 100 * TOLERANCE
        assert largest_difference(rows, true_rows(changed, text)) < TOLERANCE
    finally:
        await asyncio.to_thread(sender.shutdown)
