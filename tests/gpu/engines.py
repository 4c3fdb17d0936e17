"""Part (b): vLLM engines in this process, without Ray: what they read and write, beside Hugging Face and beside
themselves.

n = tokens of a text, k = length of a top list, V = vocabulary, as in ``rollout_server/engines/protocol.py``.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.sequence import Floats, Ids, TopLogprobs
from rollout_server.engines.protocol import GoOn, ScoreRequest, WriteRequest, next_piece
from rollout_server.engines.selftest import check_engine
from tests.gpu.context import Context
from tests.gpu.engines_costs import prompt_logprob_memory, top_k_cost
from tests.gpu.models import MIDDLE, QWEN2_500M, random_text
from tests.gpu.readings import differences, hugging_face, rows_at
from tests.gpu.records import Figures

if TYPE_CHECKING:
    from rollout_server.engines.vllm import VLLMEngine

TOP_LOGPROBS = 64
FLOAT32_BOUND = 1e-3
"""Nats, the largest difference: sums in another order give some 1e-5, a row of another position far more."""
PREFIXES = (0, 16, 32, 96)
"""Cached tokens of a text of 96: none, whole blocks, all."""


def score_rows(context: Context, figures: Figures) -> None:
    """Each text is new, so that nothing is cached but what the check itself had read before."""
    engine, rows_of = _middle(context), hugging_face(context, context.model(MIDDLE), torch.float32)
    for number, num_cached in enumerate(PREFIXES):
        text = random_text(96, MIDDLE.vocabulary, seed=number)

        async def read(text: Ids = text, num_cached: int = num_cached) -> list[tuple[int, TopLogprobs]]:
            if num_cached:
                await engine.score(ScoreRequest(token_ids=text[:num_cached], start=num_cached))
            # From the first row that was not read before, then from the middle of what is cached, then all.
            starts = dict.fromkeys((min(num_cached + 1, text.size), max(1, num_cached // 2), 1))
            return [(start, await engine.score(ScoreRequest(token_ids=text, start=start))) for start in starts]

        expected_nV = rows_of(text)
        largest = max(
            float(differences(rows, rows_at(expected_nV[start - 1 :], rows)).max())
            for start, rows in context.run(read())
        )
        figures.add(f"{num_cached} tokens cached, largest difference", largest, "nats", at_most=FLOAT32_BOUND)
    figures.add("of a prefix of 48, found in the cache", _num_found(context, engine), "tokens", at_least=32)
    texts = [random_text(20 + 7 * number, MIDDLE.vocabulary, seed=100 + number) for number in range(12)]
    at_once = context.run(_read_all(engine, texts))
    largest = max(
        float(differences(rows, rows_at(rows_of(text), rows)).max()) for text, rows in zip(texts, at_once, strict=True)
    )
    figures.add("12 texts at once, largest difference", largest, "nats", at_most=FLOAT32_BOUND)


def self_test(context: Context, figures: Figures) -> None:
    prefix = random_text(12, MIDDLE.vocabulary, seed=7)
    context.run(_check(_middle(context), prefix))


def resumed_requests(context: Context, figures: Figures) -> None:
    """The same greedy continuation in one go, in a stream with pauses, and in three requests over cached prefixes."""
    engine, num_tokens = _middle(context), 96 if context.is_cuda else 40
    requests = [
        _request(random_text(30 + number, MIDDLE.vocabulary, seed=200 + number), num_tokens) for number in range(8)
    ]

    async def all_of(write: Callable[["VLLMEngine", WriteRequest], object]) -> list[Ids]:
        return await asyncio.gather(*(write(engine, request) for request in requests))

    whole = context.run(all_of(_in_one_go))
    for name, write in (("paused", _with_pauses), ("ended and taken up again", _in_pieces)):
        others = context.run(all_of(write))
        num_other = sum(_num_differing(left, right) for left, right in zip(whole, others, strict=True))
        figures.add(f"{name}: tokens that differ", num_other, "tokens", at_most=0)
    figures.add("tokens compared", sum(text.size for text in whole), "tokens", at_least=num_tokens * len(requests))


def seeds(context: Context, figures: Figures) -> None:
    engine, num_tokens = _middle(context), 64 if context.is_cuda else 24
    prompts = [random_text(24 + number, MIDDLE.vocabulary, seed=300 + number) for number in range(12)]
    requests = [_request(prompt, num_tokens, temperature=1.0, seed=number) for number, prompt in enumerate(prompts)]
    other = replace(requests[0], seed=1234)

    async def written() -> tuple[list[Ids], list[Ids], Ids]:
        alone = [await _in_one_go(engine, request) for request in requests[:3]]
        in_company = await asyncio.gather(*(_in_one_go(engine, request) for request in requests))
        return alone, in_company, await _in_one_go(engine, other)

    alone, in_company, with_other_seed = context.run(written())
    again = sum(_num_differing(left, right) for left, right in zip(alone, in_company, strict=False))
    figures.add("alone and in company: tokens that differ", again, "tokens", at_most=0)
    figures.add("another seed: tokens that differ", _num_differing(alone[0], with_other_seed), "tokens", at_least=1)


def chunked_prefill(context: Context, figures: Figures) -> None:
    context.needs_cuda("vLLM's processor build reads prompts whole here")
    engine = context.engine(
        context.model(MIDDLE),
        top_logprobs=TOP_LOGPROBS,
        dtype="float32",
        enforce_eager=True,
        max_num_batched_tokens=256,
    )
    rows_of = hugging_face(context, context.model(MIDDLE), torch.float32)
    texts = [random_text(length, MIDDLE.vocabulary, seed=length) for length in (1000, 257, 512, 700)]
    read = context.run(_read_all(engine, texts))
    for text, rows in zip(texts, read, strict=True):
        largest = float(differences(rows, rows_at(rows_of(text), rows)).max())
        figures.add(f"{text.size} tokens in steps of 256, largest", largest, "nats", at_most=FLOAT32_BOUND)


def score_rows_bfloat16(context: Context, figures: Figures) -> None:
    """No two computations in bfloat16 agree: the engine may be twice as far from float32 as Hugging Face is, and must
    be far nearer to each row than to its neighbours.
    """
    context.needs_cuda("bfloat16 is slow on most processors")
    context.needs_gib(12.0)
    texts = [random_text(256, QWEN2_500M.vocabulary, seed=400 + number) for number in range(4)]
    engine = _shaped(context)
    read = context.run(_read_all(engine, texts))
    exact, rounded = (
        [rows_at(rows_of(text), rows, shifts=(0, 1, -1)) for text, rows in zip(texts, read, strict=True)]
        for rows_of in (
            hugging_face(context, context.model(QWEN2_500M, "bfloat16"), dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
    )

    def rms(left: Sequence[Floats], right: Sequence[Floats]) -> float:
        return float(np.sqrt(np.mean(np.concatenate([(a - b).ravel() for a, b in zip(left, right, strict=True)]) ** 2)))

    inner = [rows.logprobs[1:-1] for rows in read]
    true, above, below = ([expected[place][1:-1] for expected in exact] for place in range(3))
    theirs = rms([expected[0][1:-1] for expected in rounded], true)
    figures.add("Hugging Face's bfloat16 from float32, rms", theirs, "nats")
    figures.add("engine from float32, rms", rms(inner, true), "nats", at_most=2 * theirs + 0.01)
    all_differences = np.abs(np.concatenate([(a - b).ravel() for a, b in zip(inner, true, strict=True)]))
    figures.add("engine from float32, 99%", float(np.quantile(all_differences, 0.99)), "nats")
    figures.add("engine from float32, largest", float(all_differences.max()), "nats")
    nearest = min(rms(inner, above), rms(inner, below))
    figures.add("rms against a neighbouring row over its own", nearest / rms(inner, true), "", at_least=3.0)
    context.run(_check(engine, texts[0][:12]))


CHECKS: dict[str, Callable[[Context, Figures], None]] = {
    "score_rows": score_rows,
    "self_test": self_test,
    "resumed_requests": resumed_requests,
    "seeds": seeds,
    "score_rows_bfloat16": score_rows_bfloat16,
    "top_k_cost": top_k_cost,
    "chunked_prefill": chunked_prefill,
    "prompt_logprob_memory": prompt_logprob_memory,
}


async def _check(engine: "VLLMEngine", prefix: Ids) -> None:
    """As a run does; UserError where it fails."""
    await check_engine(engine, name="engine", prefix=prefix, top_logprobs=TOP_LOGPROBS, dtype=engine.facts.dtype)


def _middle(context: Context) -> "VLLMEngine":
    return context.engine(context.model(MIDDLE), top_logprobs=TOP_LOGPROBS, dtype="float32", enforce_eager=True)


def _shaped(context: Context) -> "VLLMEngine":
    return context.engine(context.model(QWEN2_500M, "bfloat16"), top_logprobs=TOP_LOGPROBS, dtype="bfloat16")


def _num_found(context: Context, engine: "VLLMEngine") -> int:
    """Cached tokens that vLLM reports for a text whose first half was read before: without any, nothing above would
    have tried what it is there to try.
    """
    text = random_text(96, MIDDLE.vocabulary, seed=99)

    async def read() -> int:
        await engine.score(ScoreRequest(token_ids=text[:48], start=48))
        return (await engine._read(ScoreRequest(token_ids=text, start=49), skip_cache=False)).num_cached_tokens or 0

    return context.run(read())


def _request(prefix: Ids, num_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> WriteRequest:
    return WriteRequest(
        prefix=prefix,
        max_tokens=num_tokens,
        temperature=temperature,
        top_p=1.0,
        seed=seed,
        chunk_tokens=16,
        ignore_eos=True,
    )


async def _read_all(engine: "VLLMEngine", texts: Sequence[Ids]) -> list[TopLogprobs]:
    return await asyncio.gather(*(engine.score(ScoreRequest(token_ids=text, start=1)) for text in texts))


async def _in_one_go(engine: "VLLMEngine", request: WriteRequest) -> Ids:
    return (await engine.generate(request)).token_ids


async def _with_pauses(engine: "VLLMEngine", request: WriteRequest) -> Ids:
    """After 5 tokens, after 6 more, and so on."""
    pieces: list[Ids] = []
    async with aclosing(engine.stream(replace(request, pause_after=5))) as stream:
        go_on = None
        while (piece := await next_piece(stream, go_on)) is not None:
            pieces.append(piece.token_ids)
            go_on = GoOn(num_tokens=5 + len(pieces))
    return np.concatenate(pieces)


async def _in_pieces(engine: "VLLMEngine", request: WriteRequest) -> Ids:
    """Three requests, each on what the ones before wrote."""
    written = np.empty(0, np.int32)
    for num_tokens in (7, 16, request.max_tokens - 23):
        prefix = np.concatenate([request.prefix, written])
        piece = await engine.generate(replace(request, prefix=prefix, max_tokens=num_tokens))
        written = np.concatenate([written, piece.token_ids])
    return written


def _num_differing(left: Ids, right: Ids) -> int:
    """Tokens after the first that differs count too."""
    if left.size != right.size:
        return max(left.size, right.size)
    differing = np.flatnonzero(left != right)
    return int(left.size - differing[0]) if differing.size else 0
