"""A real engine whose weight update fails half-way. The backend is vLLM's own for NCCL, which nobody has opened: it
brings every layer into the state for loading and then finds that it has nobody to receive from.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio

from common.sequence import Ids
from common.weights import WeightUpdate
from rollout_server.actors import EngineActor
from rollout_server.engines.protocol import EngineCallError, EngineSpec, ScoreRequest, WriteRequest
from rollout_server.engines.remote.server import StreamMultiplexer
from rollout_server.engines.vllm import VLLMEngine
from rollout_server.engines.vllm_plugin.weight_transfer import WeightsLost

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT: Ids = np.arange(4, 19, dtype=np.int32)
REASON = "update to weight version 1 failed half-way: .*NCCL weight transfer not initialized"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(make_spec: Callable[[str], EngineSpec]) -> AsyncIterator[VLLMEngine]:
    engine = VLLMEngine.start(replace(make_spec("student"), weight_transfer_backend="nccl"))
    yield engine
    engine.shutdown()


def write_request(**settings: object) -> WriteRequest:
    defaults = {"max_tokens": 100, "temperature": 2.0, "top_p": 1.0, "seed": 1, "chunk_tokens": 1, "ignore_eos": True}
    return WriteRequest(prefix=PROMPT, **(defaults | settings))


async def test_after_an_update_that_failed_half_way_the_engine_says_so_and_serves_nobody(engine) -> None:
    first_pieces = asyncio.Queue[int]()

    async def write(seed: int) -> None:
        async with aclosing(engine.stream(write_request(seed=seed))) as pieces:
            async for piece in pieces:
                first_pieces.put_nowait(len(piece))

    under_way = [asyncio.create_task(write(seed)) for seed in range(3)]
    for _ in under_way:
        await first_pieces.get()
    assert engine.failure is None
    update = WeightUpdate(version=1, transfer_info={"names": [], "dtype_names": [], "shapes": []})
    with pytest.raises(WeightsLost, match=REASON):
        await engine.load_weights(update)

    ended = await asyncio.wait_for(asyncio.gather(*under_way, return_exceptions=True), 10.0)
    assert {type(error) for error in ended} == {EngineCallError}
    actor = EngineActor()
    actor._engine, actor._streams = engine, StreamMultiplexer(engine)
    failure = (await actor.health()).failure
    assert failure is not None
    assert failure == engine.failure == str(ended[0])

    with pytest.raises(EngineCallError, match=REASON):
        await engine.generate(write_request())
    with pytest.raises(EngineCallError, match=REASON):
        await anext(engine.stream(write_request(pause_after=1)))
    with pytest.raises(EngineCallError, match=REASON):
        await engine.score(ScoreRequest(token_ids=PROMPT, start=1))
    with pytest.raises(EngineCallError, match=REASON):
        await engine.load_weights(update)
    assert engine.weight_version == 0
    assert engine.num_running == 0
    assert await engine._llm.is_paused(), "no step may run on layers without data"
