"""One sequence for who watches: the same decisions as the controller's, piece by piece, over scripted engines."""

import asyncio
import math
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from common.config import SKD, AdaSwitch, Dataset, OffPolicy, OnPolicy, Sampling, Trace
from common.seeds import derive_seed
from common.sequence import MixedSequence, Prompt
from rollout_server.controller import SwitchingController
from rollout_server.engines.scripted import Fault, HashedScript, ScriptedEngine
from rollout_server.inspector.live_records import LiveEnd, LiveFailure, LiveRefusal, LiveRequest, LiveStart, LiveTokens
from rollout_server.live_writer import MAX_AT_ONCE, LiveWriter
from rollout_server.rollouts import LiveContext, RolloutSpec
from rollout_server.traces.writer import TraceWriter
from tests.support.trace_reader import TraceReader

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "models" / "student"
TEACHER = HashedScript(vocabulary_size=32, seed=1, eos_token_id=2)
ENDLESS = replace(TEACHER, eos_probability=1e-9)
K, CONTEXT = 8, 128
POLICY = AdaSwitch(window=4, floor=0.1)
SAMPLING = Sampling(max_new_tokens=48, chunk_tokens=4)
PROMPT = LiveRequest(prompt="1+2*3=", seed=5)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


class Live:
    """A writer over two scripted engines."""

    def __init__(self, tokenizer: Any, tmp_path: Path, script: HashedScript = TEACHER, **settings: Any) -> None:
        self.student = ScriptedEngine(script.student(seed=2), top_logprobs=K, max_model_len=CONTEXT, **settings)
        self.teacher = ScriptedEngine(script, top_logprobs=K, max_model_len=CONTEXT)
        spec = RolloutSpec(
            policy=POLICY,
            sampling=SAMPLING,
            trace=Trace(top_alternatives=3),
            trace_folder=tmp_path / "traces",
            top_logprobs=K,
            stop_token_ids=(2,),
        )
        context = LiveContext(max_model_len=CONTEXT, prompts_as_chat=False)
        self.writer = LiveWriter(spec, context, student=self.student, teacher=self.teacher, tokenizer=tokenizer)

    async def write(self, request: LiveRequest) -> tuple[LiveStart, list[LiveTokens], LiveEnd]:
        pieces = [piece async for piece in self.writer.write(request)]
        start, *tokens, end = pieces
        assert isinstance(start, LiveStart)
        assert isinstance(end, LiveEnd)
        return start, [piece for piece in tokens if isinstance(piece, LiveTokens)], end

    def rest(self) -> bool:
        return self.student.num_running == self.teacher.num_running == 0

    async def controller_s(self, policy: Any, prompt_ids: list[int], seed: int) -> MixedSequence:
        """What the controller writes for the same prompt."""
        controller = SwitchingController(
            student=self.student,
            teacher=self.teacher,
            policy=policy,
            sampling=SAMPLING,
            top_logprobs=K,
            stop_token_ids=(2,),
        )
        ids = np.array(prompt_ids, np.int32)
        return await controller.generate(Prompt(prompt_id="p", token_ids=ids, seed=derive_seed("live", seed)))


@pytest.fixture
def live(tokenizer, tmp_path) -> Live:
    return Live(tokenizer, tmp_path)


@pytest.mark.parametrize("policy", [None, AdaSwitch(window=2, multiplier=1.5), SKD(top_k=1), OnPolicy(), OffPolicy()])
@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_what_is_watched_is_what_the_controller_writes_and_a_trace_would_hold(
    live, tokenizer, tmp_path, policy, seed
) -> None:
    prompt_ids = tokenizer(PROMPT.prompt).input_ids
    start, pieces, end = await live.write(replace(PROMPT, policy=policy, seed=seed))
    sequence = await live.controller_s(policy or POLICY, prompt_ids, seed)

    writer = TraceWriter(
        tmp_path / "expected",
        decode=tokenizer.decode,
        token_texts=lambda ids: [tokenizer.decode([i]) for i in ids],
        top_alternatives=3,
    )
    writer.write_segment(1, [sequence])
    with TraceReader(tmp_path / "expected") as reader:
        expected = reader.sequence(sequence.sequence_id)
    assert expected is not None
    assert [token for piece in pieces for token in piece.tokens] == expected.tokens
    assert start.policy == (policy or POLICY)
    assert (start.num_prompt_tokens, start.max_new_tokens) == (len(prompt_ids), 48)
    assert end.completion_text == expected.sequence.completion_text
    assert end.switches == expected.sequence.switches
    assert (end.num_tokens, end.num_teacher_tokens) == (len(sequence), sequence.num_teacher_tokens)
    assert end.finish_reason == sequence.finish_reason
    assert end.num_wasted_tokens >= 0
    assert live.rest()


async def test_tokens_come_while_the_sequence_is_written(tokenizer, tmp_path) -> None:
    live = Live(tokenizer, tmp_path, ENDLESS, delay=lambda: 0.06)
    _, pieces, _ = await live.write(replace(PROMPT, policy=OnPolicy(), max_new_tokens=100))
    assert len(pieces) > 16, "a text that nothing interrupts is read in eight pieces where nobody looks on"
    assert [token.position for piece in pieces for token in piece.tokens] == list(range(100))


async def test_every_alternative_is_named_once(live) -> None:
    _, pieces, _ = await live.write(PROMPT)
    named: set[int] = set()
    for piece in pieces:
        assert not named & piece.texts.keys()
        named |= piece.texts.keys()
        for token in piece.tokens:
            assert {*(token.student_top_ids or ()), *(token.teacher_top_ids or ())} <= named


async def test_token_ids_are_taken_as_they_are_and_the_same_seed_writes_the_same(live, tokenizer) -> None:
    ids = tuple(tokenizer(PROMPT.prompt).input_ids)
    first, second, other = [
        (await live.write(request))[2].completion_text
        for request in (PROMPT, replace(PROMPT, prompt=ids), replace(PROMPT, seed=6))
    ]
    assert first == second != other


async def test_limits_of_the_request_hold(live) -> None:
    start, pieces, end = await live.write(replace(PROMPT, max_new_tokens=5, temperature=0.0, policy=OnPolicy()))
    assert (start.max_new_tokens, start.temperature) == (5, 0.0)
    assert end.num_tokens <= 5
    tokens = [token for piece in pieces for token in piece.tokens]
    assert all(token.student_top_ids and token.token_id == token.student_top_ids[0] for token in tokens)


async def test_a_long_prompt_shortens_what_is_written(live) -> None:
    start, _, _ = await live.write(LiveRequest(prompt=(5,) * (CONTEXT - 3)))
    assert start.max_new_tokens == 3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (LiveRequest(prompt=(5,) * CONTEXT), "the prompt has 128 tokens, expected 1 to 127"),
        (LiveRequest(prompt=(5, 32)), r"prompt_token_ids must be in 0\.\.31"),
        (replace(PROMPT, max_new_tokens=127), "max_new_tokens must be <= 121"),
        (replace(PROMPT, as_chat=True), "no chat template"),
        (replace(PROMPT, policy=Dataset()), "a live prompt has none"),
    ],
)
async def test_what_cannot_be_written_is_refused_before_anything_is(live, request_, message) -> None:
    with pytest.raises(LiveRefusal, match=message) as refusal:
        await live.write(request_)
    assert refusal.value.kind == "invalid"
    assert live.student.num_calls["write"] == live.teacher.num_calls["score"] == 0


async def test_closing_ends_it_in_both_engines(tokenizer, tmp_path) -> None:
    live = Live(tokenizer, tmp_path, ENDLESS, delay=lambda: 0.1)
    async with aclosing(live.writer.write(replace(PROMPT, policy=OnPolicy()))) as pieces:
        await anext(pieces)
        await anext(pieces)
        assert not live.rest()
    assert live.rest()
    written = live.student.num_written_tokens
    await asyncio.sleep(0.3)
    assert live.student.num_written_tokens == written


async def test_only_so_many_are_written_at_once(tokenizer, tmp_path) -> None:
    live = Live(tokenizer, tmp_path, ENDLESS, delay=lambda: 0.01)
    running = [live.writer.write(PROMPT) for _ in range(MAX_AT_ONCE)]
    for pieces in running:
        await anext(pieces)
    with pytest.raises(LiveRefusal, match="training has priority") as refusal:
        await anext(live.writer.write(PROMPT))
    assert refusal.value.kind == "busy"
    await running[0].aclose()
    async with aclosing(live.writer.write(PROMPT)) as another:
        assert isinstance(await anext(another), LiveStart)
    for pieces in running[1:]:
        await pieces.aclose()
    assert live.rest()


async def test_an_engine_s_failure_is_told_and_leaves_nothing_running(tokenizer, tmp_path) -> None:
    live = Live(tokenizer, tmp_path, fault=Fault(call="write", number=1))
    with pytest.raises(LiveFailure, match="ScriptedError: write 1 fails as scripted"):
        await live.write(PROMPT)
    assert live.rest()


async def test_the_mean_divergence_is_the_tokens(live) -> None:
    _, pieces, end = await live.write(PROMPT)
    values = [t.divergence for piece in pieces for t in piece.tokens if t.divergence is not None]
    assert end.mean_divergence is not None
    assert math.isclose(end.mean_divergence, float(np.mean(values)), rel_tol=1e-5)
