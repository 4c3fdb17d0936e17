"""A step's rollouts as offline batches of vLLM: what they must take at least, each engine alone on the GPU."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as parquet

from common.config import Sampling
from rollout_server.engines.protocol import ScoreRequest, WriteRequest
from tests.benchmarks.work import Batches, offline_batches
from tests.gpu.context import Context
from tests.gpu.models import random_sequences

if TYPE_CHECKING:
    from rollout_server.engines.vllm import VLLMEngine

NUM_PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineTimes:
    """Seconds of one step's work."""

    student_s: float
    teacher_s: float  # prompts, then the student's tokens with log-probs, then its own writing

    @property
    def serial_s(self) -> float:
        return self.student_s + self.teacher_s

    @property
    def parallel_s(self) -> float:
        return max(self.student_s, self.teacher_s)


def offline_times(context: Context, run: Path, config: dict[str, Any], vocabulary: int, *, step: int) -> OfflineTimes:
    """Texts of the lengths of the run's step, each engine started as the run started it, warm."""
    warm, measured = (_batches(run, config, vocabulary, step, seed=seed) for seed in (0, 1))
    seconds = {}
    for role in ("student", "teacher"):
        engine = context.engine(
            Path(config["models"][role]), top_logprobs=config["engines"]["top_logprobs"], **config["engines"][role]
        )
        for batches in (warm, measured):
            seconds[role] = context.run(_time(engine, role, batches))
    context.end_engine()
    return OfflineTimes(student_s=seconds["student"], teacher_s=seconds["teacher"])


def _batches(run: Path, config: dict[str, Any], vocabulary: int, step: int, *, seed: int) -> Batches:
    (segment,) = (run / "traces").glob(f"step-{step:06d}")
    columns = ["num_tokens", "num_student_tokens"]
    rows = parquet.read_table(segment / "sequences.parquet", columns=columns).to_pylist()
    sequences = random_sequences(
        [(NUM_PROMPT_TOKENS, row["num_tokens"]) for row in rows],
        vocabulary,
        k=8,
        seed=seed,
        num_student=[row["num_student_tokens"] for row in rows],
    )
    return offline_batches(sequences, Sampling(**config["sampling"]))


async def _time(engine: "VLLMEngine", role: str, batches: Batches) -> float:
    started_s = time.perf_counter()
    if role == "student":
        await _all(engine, batches.student_writes)
    else:
        for requests in (batches.teacher_prompts, batches.teacher_reads, batches.teacher_writes):
            await _all(engine, requests)
    return time.perf_counter() - started_s


async def _all(engine: "VLLMEngine", requests: Sequence[WriteRequest | ScoreRequest]) -> None:
    await asyncio.gather(
        *(engine.score(it) if isinstance(it, ScoreRequest) else engine.generate(it) for it in requests)
    )
