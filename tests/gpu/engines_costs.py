"""Part (b), what log-probs cost: time by the length of the list, and memory of a step full of prompt tokens."""

import asyncio
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from rollout_server.engines.protocol import ScoreRequest, WriteRequest
from rollout_server.engines.vllm_memory import Scoring
from tests.gpu.context import GIB, Context
from tests.gpu.models import MIDDLE, QWEN2_500M, random_text
from tests.gpu.records import Figures

if TYPE_CHECKING:
    from rollout_server.engines.vllm import VLLMEngine

ALLOCATOR_GIB = 0.25
"""torch takes memory in blocks larger than what is asked for."""


def top_k_cost(context: Context, figures: Figures) -> None:
    """One vLLM, asked for lists of several lengths: a batch of texts written, another read from its first token."""
    from rollout_server.engines.vllm import VLLMEngine

    shape, dtype, ks = (QWEN2_500M, "bfloat16", (1, 16, 64, 256, 1024))
    num_writes, num_new, num_reads, length = 64, 128, 8, 512
    if not context.is_cuda:
        shape, dtype, ks, num_writes, num_new, num_reads, length = MIDDLE, "float32", (1, 16, 64), 8, 8, 2, 64
    model = context.model(shape, dtype)
    engine = context.engine(model, top_logprobs=64, dtype=dtype, enforce_eager=not context.is_cuda)
    random = np.random.default_rng(0)
    speeds = {}
    for k in (ks[0], *ks):  # the first one is a warm-up
        of_length = VLLMEngine(engine._llm, k)
        written = context.run(_write(of_length, shape.vocabulary, num_writes, num_new, int(random.integers(2**31))))
        read = context.run(_read(of_length, shape.vocabulary, num_reads, length, int(random.integers(2**31))))
        speeds[k] = written, read
    for k, (written, read) in speeds.items():
        figures.add(f"k = {k}: written", written, "tokens/s")
        figures.add(f"k = {k}: read", read, "tokens/s")
    figures.add("writing at k = 64 over k = 1", speeds[64][0] / speeds[1][0], "")
    figures.add("reading at k = 64 over k = 1", speeds[64][1] / speeds[1][1], "")


async def _write(engine: "VLLMEngine", vocabulary: int, num_texts: int, num_tokens: int, seed: int) -> float:
    """Tokens/s of new prompts of 32 tokens."""
    requests = [
        WriteRequest(
            prefix=random_text(32, vocabulary, seed=seed + number),
            max_tokens=num_tokens,
            temperature=1.0,
            top_p=1.0,
            seed=number,
            chunk_tokens=num_tokens,
            ignore_eos=True,
        )
        for number in range(num_texts)
    ]
    started_s = time.perf_counter()
    await asyncio.gather(*(engine.generate(request) for request in requests))
    return num_texts * num_tokens / (time.perf_counter() - started_s)


async def _read(engine: "VLLMEngine", vocabulary: int, num_texts: int, length: int, seed: int) -> float:
    """Tokens/s, a row for every token."""
    requests = [
        ScoreRequest(token_ids=random_text(length, vocabulary, seed=seed + number), start=1)
        for number in range(num_texts)
    ]
    started_s = time.perf_counter()
    await asyncio.gather(*(engine.score(request) for request in requests))
    return num_texts * length / (time.perf_counter() - started_s)


def prompt_logprob_memory(context: Context, figures: Figures) -> None:
    """What the engine's processes take of the GPU for the rows of one step of 8,192 tokens, beyond what the same step
    takes without rows. torch keeps what it once took, so the rise is the peak.
    """
    context.needs_cuda("it is the GPU's memory that is measured")
    from rollout_server.engines.vllm_args import Hardware

    context.needs_gib(24.0)
    num_tokens = 8192
    engine = context.engine(
        context.model(QWEN2_500M, "bfloat16"),
        top_logprobs=64,
        dtype="bfloat16",
        enforce_eager=True,
        max_num_batched_tokens=num_tokens,
        max_model_len=num_tokens + 64,
    )
    texts = [random_text(num_tokens, QWEN2_500M.vocabulary, seed=500 + number) for number in range(2)]
    context.run(engine.score(ScoreRequest(token_ids=texts[0], start=num_tokens)))
    before_bytes = torch.cuda.mem_get_info()[0]
    context.run(engine.score(ScoreRequest(token_ids=texts[1], start=1)))
    taken_gib = (before_bytes - torch.cuda.mem_get_info()[0]) / GIB
    scoring = Scoring(
        vocabulary=QWEN2_500M.vocabulary,
        top_logprobs=64,
        dtype_bytes=2,
        in_pieces=Hardware.detect().scores_in_pieces,
    )
    expected_gib = scoring.bytes_for(num_tokens) / GIB
    figures.add("taken for the rows", taken_gib, "GiB", at_most=1.1 * expected_gib + ALLOCATOR_GIB)
    figures.add("by the arithmetic of rollout_server/engines/vllm_memory.py", expected_gib, "GiB")
