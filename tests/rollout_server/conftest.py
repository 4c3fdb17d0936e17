"""The demo pair, twice: as real vLLM engines and as Hugging Face models. Started once, for all tests that need them.

Tests that use the engines run on the session's event loop, to which the engines belong.
"""

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from common.config import EngineSettings
from common.sequence import Ids, Prompt, TopLogprobs
from rollout_server.engines.protocol import Engine, EngineSpec, WriteRequest, Written
from rollout_server.engines.vllm import VLLMEngine
from tests.support import streams

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
VOCABULARY_SIZE = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EnginePair:
    """Both roles' engines."""

    student: VLLMEngine
    teacher: VLLMEngine


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelPair:
    """The same weights where every logit can be seen."""

    student: LlamaForCausalLM
    teacher: LlamaForCausalLM


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """``models/student``, ``models/teacher``, ``data/train.jsonl``, ``data/held_out.jsonl``."""
    return DEMO


@pytest.fixture(scope="session")
def make_spec() -> Callable[[str], EngineSpec]:
    """How the engine of a role is started on a processor."""
    return _make_spec


def _make_spec(role: str) -> EngineSpec:
    """The student keeps to one core."""
    return EngineSpec(
        name=role,
        model=str(DEMO / "models" / role),
        settings=EngineSettings(
            dtype="float32",
            enforce_eager=True,
            kv_cache_gib=0.25,
            max_num_seqs=256,
            cpu_cores=(max(os.sched_getaffinity(0)),) if role == "student" else (),
        ),
        top_logprobs=VOCABULARY_SIZE,
        weight_transfer_backend=None,
    )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engines() -> AsyncIterator[EnginePair]:
    """Two real engines with the whole vocabulary as their top k.

    Started in turn: an engine's environment is this process's while it starts.
    """
    student, teacher = VLLMEngine.start(_make_spec("student")), VLLMEngine.start(_make_spec("teacher"))
    yield EnginePair(student=student, teacher=teacher)
    student.shutdown()
    teacher.shutdown()


@pytest.fixture(scope="session")
def pieces_of() -> Callable[[Engine, WriteRequest, Sequence[int]], Awaitable[list[Written]]]:
    """What an engine hands over for a request that pauses after so many tokens, and so many more, and then no more."""
    return streams.pieces_of


@pytest.fixture(scope="session")
def models() -> ModelPair:
    """The demo pair in Hugging Face, float32."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(DEMO / "models" / role, dtype=torch.float32).eval()
        for role in ("student", "teacher")
    )
    return ModelPair(student=student, teacher=teacher)


@pytest.fixture(scope="session")
def held_out_prompts() -> list[Prompt]:
    """The demo's 500 held-out prompts, 15 tokens each."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / "student")
    lines = (DEMO / "data" / "held_out.jsonl").read_text().splitlines()
    return [
        Prompt(
            prompt_id=str(number),
            token_ids=np.array(tokenizer(json.loads(line)["prompt"]).input_ids, np.int32),
            seed=number,
        )
        for number, line in enumerate(lines)
    ]


@pytest.fixture(scope="session")
def true_rows() -> Callable[[LlamaForCausalLM, Ids], npt.NDArray[np.float64]]:
    """[n, V] nats. Row j is the whole distribution of token j + 1 of a text: one Hugging Face pass, no cache."""
    return _true_rows


@torch.inference_mode()
def _true_rows(model: LlamaForCausalLM, text: Ids) -> npt.NDArray[np.float64]:
    logits = model(input_ids=torch.from_numpy(text).long()[None], use_cache=False).logits[0]
    rows: npt.NDArray[np.float64] = logits.double().log_softmax(dim=-1).numpy()
    return rows


@pytest.fixture(scope="session")
def largest_difference() -> Callable[[TopLogprobs, npt.NDArray[np.float64]], float]:
    """nats. Between listed log-probs [n, k] and whole distributions [n, V]; also checks that the best come first."""
    return _largest_difference


def _largest_difference(rows: TopLogprobs, expected: npt.NDArray[np.float64]) -> float:
    assert len(rows) == len(expected), (len(rows), len(expected))
    assert (np.diff(rows.logprobs, axis=1) <= 0).all(), "the best must come first"
    assert all(np.unique(ids).size == rows.k for ids in rows.token_ids), "no id twice in a row"
    return float(np.abs(rows.logprobs - np.take_along_axis(expected, rows.token_ids, axis=1)).max())
