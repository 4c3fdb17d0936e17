"""The self-test on a real model that rounds differently when it writes and when it reads, as GPU kernels do.

It writes in bfloat16, token by token from a cache, and reads in one pass with float32 weights under autocast. vLLM's
kernels on processors round alike on both ways, so that its rows would show nothing.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from common.errors import UserError
from common.sequence import Ids, TopLogprobs
from common.weights import WeightUpdate
from rollout_server.engines.protocol import Engine, ScoreRequest, WriteRequest, Written, write_whole
from rollout_server.engines.selftest import check_engine
from tests.support.smollm2 import smollm2_pair

K = 64

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the first time makes the models, too


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceEngine:
    """The same weights twice."""

    writer: LlamaForCausalLM
    reader: LlamaForCausalLM

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, None]:
        token_ids, rows, cache = [], [], None
        text_S = torch.from_numpy(request.prefix).long()
        random = torch.Generator().manual_seed(request.seed)
        for _ in range(request.max_tokens):
            with torch.inference_mode():
                output = self.writer(text_S[None], past_key_values=cache, use_cache=True)
            logits_V, cache = output.logits[0, -1].float(), output.past_key_values
            rows.append(logits_V.log_softmax(dim=-1))
            text_S = torch.multinomial((logits_V / request.temperature).softmax(dim=-1), 1, generator=random)
            token_ids.append(int(text_S))
        top = top_of(torch.stack(rows))
        ids = np.array(token_ids, np.int32)
        yield Written(token_ids=ids, logprobs=top.logprob_of(ids), top=top, weight_version=0, finish_reason="length")

    async def generate(self, request: WriteRequest) -> Written:
        return await write_whole(self, request)

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            logits_SV = self.reader(torch.from_numpy(request.token_ids).long()[None]).logits[0]
        return top_of(logits_SV[request.start - 1 :].float().log_softmax(dim=-1))

    async def load_weights(self, update: WeightUpdate) -> None:
        raise NotImplementedError


def top_of(logprobs_NV: Tensor) -> TopLogprobs:
    best = logprobs_NV.topk(K)
    return TopLogprobs(best.indices.numpy().astype(np.int32), best.values.numpy())


@pytest.fixture(scope="module")
def engine() -> HuggingFaceEngine:
    """Of the student, whose text repeats itself."""
    folder = smollm2_pair().student
    writer, reader = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for dtype in (torch.bfloat16, torch.float32)
    )
    return HuggingFaceEngine(writer=writer, reader=reader)


@pytest.fixture(scope="module")
def prefix() -> Ids:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_pair().student)
    return np.array(tokenizer("Why is the sky blue? ").input_ids, np.int32)


@dataclass
class Shifted:
    """Its score rows belong to other positions."""

    honest: Engine
    by: int

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, None]:
        async for written in self.honest.stream(request):
            yield written

    async def generate(self, request: WriteRequest) -> Written:
        return await self.honest.generate(request)

    async def score(self, request: ScoreRequest) -> TopLogprobs:
        rows = await self.honest.score(request)
        places = np.clip(np.arange(len(rows)) + self.by, 0, len(rows) - 1)
        return TopLogprobs(rows.token_ids[places], rows.logprobs[places])

    async def load_weights(self, update: WeightUpdate) -> None:
        await self.honest.load_weights(update)


async def test_two_roundings_of_one_model_pass(engine: HuggingFaceEngine, prefix: Ids) -> None:
    await check_engine(engine, name="student", prefix=prefix, top_logprobs=K, dtype="bfloat16")


async def test_they_would_not_pass_as_float32(engine: HuggingFaceEngine, prefix: Ids) -> None:
    with pytest.raises(UserError, match=r"differ by 0\.\d+ nats \(root mean square\), expected at most 0\.005"):
        await check_engine(engine, name="student", prefix=prefix, top_logprobs=K, dtype="float32")


@pytest.mark.parametrize("by", [-1, 1])
async def test_a_shift_is_told_from_rounding(engine: HuggingFaceEngine, prefix: Ids, by: int) -> None:
    with pytest.raises(UserError, match=rf"score rows are shifted by {-by} position\(s\) relative to the tokens"):
        await check_engine(Shifted(engine, by), name="student", prefix=prefix, top_logprobs=K, dtype="bfloat16")
