"""What vLLM's asynchronous scheduling, which is on with GPUs, hands to our engine: its own scheduler and front end."""

import numpy as np
import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from common.sequence import Ids
from rollout_server.engines.rows import own_logprobs, top_rows
from tests.support.v2_scheduling import BLOCK, EOS_ID, AsyncEngine

PROMPT: Ids = np.arange(10, 20, dtype=np.int32)


def write_params(**settings: object) -> SamplingParams:
    """As ``VLLMEngine`` asks."""
    settings = {"max_tokens": 20, "stream_interval": 2, "output_kind": RequestOutputKind.DELTA} | settings
    return SamplingParams(temperature=0.0, logprobs=2, flat_logprobs=True, detokenize=False, **settings)


def count_up(req_id: str, position: int) -> int:
    return 100 + position


def test_a_token_sampled_after_a_stop_reaches_nobody() -> None:
    """The step after the stop is in flight when the stop is seen."""
    stop_at = PROMPT.size + 4

    def sample(req_id: str, position: int) -> int:
        return EOS_ID if position == stop_at else count_up(req_id, position)

    engine = AsyncEngine(sample)
    engine.add("0", PROMPT, write_params())
    outputs = []
    for _ in range(12):
        engine.step()
        outputs += engine.take("0")
    token_ids = [token_id for output in outputs for token_id in output.outputs[0].token_ids]
    assert token_ids == [110, 111, 112, 113, EOS_ID]
    assert engine._num_computed["0"] > stop_at, "a step was scheduled past the stop"
    assert [output.outputs[0].finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["stop"]
    for output in outputs:
        piece = output.outputs[0]
        assert own_logprobs(piece.logprobs).size == len(piece.token_ids)
        assert top_rows(piece.logprobs, 0, len(piece.token_ids), 2).token_ids[:, 0].tolist() == piece.token_ids
    assert not engine.scheduler.requests
    assert engine.scheduler.kv_cache_manager.usage == 0.0


def test_no_token_is_sampled_past_the_limit() -> None:
    engine = AsyncEngine(count_up)
    engine.add("0", PROMPT, write_params(max_tokens=5))
    engine.run()
    (output,) = engine.take("0")
    assert output.outputs[0].token_ids == [110, 111, 112, 113, 114]
    assert output.outputs[0].finish_reason == "length"
    assert engine._num_computed["0"] == PROMPT.size + 4


def test_what_is_in_flight_when_a_request_is_aborted_is_dropped() -> None:
    engine = AsyncEngine(count_up)
    engine.add("0", PROMPT, write_params())
    engine.add("1", PROMPT + 50, write_params(max_tokens=8))
    for _ in range(3):
        engine.step()
    num_outputs = sum(output.request_id == "0" for output in engine.core_outputs)
    engine.abort("0")
    engine.run()
    assert sum(output.request_id == "0" for output in engine.core_outputs) == num_outputs
    written = [output for output in engine.core_outputs if output.request_id == "1"]
    assert [token_id for output in written for token_id in output.new_token_ids] == list(range(110, 118))


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("prompt_tokens", [PROMPT.size, BLOCK, 40])
def test_a_session_goes_on_where_its_turn_ended(prompt_tokens: int, replaced: bool) -> None:
    """A turn begins with the last token of the one before, or another in its place; all before it stays computed."""
    prompt = np.arange(10, 10 + prompt_tokens, dtype=np.int32)
    engine = AsyncEngine(count_up, max_num_batched_tokens=24)
    engine.add("0", prompt, write_params(max_tokens=3, stream_interval=3), resumable=True)
    text, expected_turns = prompt.tolist(), [3, 1, 4]
    for number, num_tokens in enumerate(expected_turns):
        engine.run(8)
        outputs = engine.take("0")
        written = [token_id for output in outputs for token_id in output.outputs[0].token_ids]
        assert written == [count_up("0", len(text) + i) for i in range(num_tokens)]
        assert outputs[-1].outputs[0].finish_reason == "length"
        assert not outputs[-1].finished
        assert engine.scheduler.num_waiting_for_streaming_input == 1
        text += written
        if replaced:
            text[-1] = 7
        if number + 1 < len(expected_turns):
            length = expected_turns[number + 1]
            next_turn = write_params(max_tokens=length, stream_interval=length)
            engine.add("0", np.array(text[-1:], np.int32), next_turn, resumable=True)
            engine.step()
            data = engine.new_requests[-1]
            assert data.prefill_token_ids == text
            assert data.num_computed_tokens == len(text) - 1
    engine.abort("0")
    engine.run(2)
    assert not engine.scheduler.requests


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_session_is_never_interrupted_for_its_blocks(policy: str) -> None:
    """Of the first policy vLLM loses a session that is interrupted while its turn's last token is in flight: it drops
    the text and never runs it again. So our engine runs sessions before all else, under the second.
    """
    engine = AsyncEngine(count_up, num_blocks=6, scheduling_policy=policy, max_num_batched_tokens=128)
    long_text, text = np.arange(3 * BLOCK, dtype=np.int32), np.arange(100, 100 + 2 * BLOCK - 1, dtype=np.int32)
    priorities = {"other": 1, "session": 0} if policy == "priority" else {"other": 0, "session": 0}
    engine.add("other", long_text, write_params(max_tokens=10), priority=priorities["other"])
    engine.add("session", text, write_params(max_tokens=1), priority=priorities["session"], resumable=True)
    engine.run(5)  # two steps are in flight when the other one needs the last block
    assert [output.outputs[0].token_ids for output in engine.take("session")] == [[131]]
    next_turn = write_params(max_tokens=2, stream_interval=2)
    engine.add("session", np.array([131], np.int32), next_turn, resumable=True)
    engine.run()
    written = [output.outputs[0].token_ids for output in engine.take("session")]
    if policy == "fcfs":
        assert written == [], "the trap is gone: vLLM keeps a session that it has interrupted"
        return
    assert written == [[132, 133]]
    engine.abort("session")
    engine.run()
    outputs = [output.outputs[0] for output in engine.take("other")]
    assert [token_id for output in outputs for token_id in output.token_ids] == list(range(148, 158))
