"""What vLLM's Model Runner V2, which runs on GPUs, hands to our engine: its own classes, driven on a processor."""

from collections.abc import Iterator

import numpy as np
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput

from common.sequence import Ids, TopLogprobs
from rollout_server.engines.rows import own_logprobs, prompt_rows, top_rows
from tests.support.v2_batches import VOCABULARY_SIZE, StepOutput, TableModel, V2Requests, front_end

BLOCK = 16
TOLERANCE = 1e-5  # nats, float32 against float64


@pytest.fixture(scope="module")
def model() -> TableModel:
    return TableModel()


def random_text(num_tokens: int, *, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, num_tokens).astype(np.int32)


def score_params(k: int) -> SamplingParams:
    """As ``VLLMEngine.score`` asks."""
    return SamplingParams(
        temperature=0.0, max_tokens=1, logprobs=k, prompt_logprobs=k, flat_logprobs=True, detokenize=False
    )


def write_params(k: int, **settings: object) -> SamplingParams:
    return SamplingParams(max_tokens=64, logprobs=k, flat_logprobs=True, detokenize=False, **settings)


def core_output(output: StepOutput) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id="0",
        new_token_ids=output.token_ids,
        new_logprobs=output.logprobs,
        new_prompt_logprobs_tensors=output.prompt_logprobs,
    )


def largest_difference(rows: TopLogprobs, expected: np.ndarray) -> float:
    assert len(rows) == len(expected)
    return float(np.abs(rows.logprobs - np.take_along_axis(expected, rows.token_ids, axis=1)).max())


# ------------------------------------------------------------------------------------------------ a prompt's log-probs


def pieces(num_tokens: int, piece: int) -> Iterator[int]:
    while num_tokens > 0:
        yield min(piece, num_tokens)
        num_tokens -= piece


@pytest.mark.parametrize("piece", [5, 8, 128], ids=["in pieces of 5", "in pieces of 8", "whole"])
@pytest.mark.parametrize(
    ("num_tokens", "num_cached"),
    [
        pytest.param(41, 0, id="nothing cached"),
        pytest.param(41, BLOCK, id="a block cached"),
        pytest.param(41, 2 * BLOCK, id="two blocks cached"),
        pytest.param(2 * BLOCK, BLOCK, id="ends on a border"),
        pytest.param(2 * BLOCK + 1, 2 * BLOCK, id="all cached but the last token, which vLLM always computes"),
    ],
)
def test_rows_of_a_prompt_are_found_whatever_was_cached(
    num_tokens: int, num_cached: int, piece: int, model: TableModel
) -> None:
    k, text = 6, random_text(num_tokens)
    requests, processor = V2Requests(model), front_end(score_params(k), text)
    requests.add("other", random_text(20, seed=1), score_params(k + 3))
    requests.add("0", text, score_params(k), num_cached=num_cached)
    for number, length in enumerate(pieces(num_tokens - num_cached, piece)):
        step = requests.step({"0": length, "other": 5} if number % 2 else {"other": 5, "0": length})
        if step["0"].token_ids:
            processor.update_from_output(core_output(step["0"]))
        else:
            assert step["0"].prompt_logprobs is None, "rows come with the first token"

    flat = processor.prompt_logprobs
    assert len(flat) == num_tokens - num_cached, "V2 returns an empty row and those of computed tokens"
    expected = model.rows(text)
    for start in range(1, num_tokens):
        rows = prompt_rows(flat, text, start, k, num_cached=num_cached)
        if start <= num_cached:
            assert rows is None
        else:
            assert rows is not None
            assert largest_difference(rows, expected[start - 1 : -1]) < TOLERANCE
    to_come = top_rows(processor.logprobs, 0, 1, k)
    assert largest_difference(to_come, expected[-1:]) < TOLERANCE


def test_rows_that_vllm_lost_are_missing_though_it_counted_none_as_cached(model: TableModel) -> None:
    """A request that was interrupted in its prompt finds its first blocks in the cache when it goes on. V2 has
    forgotten their rows; the count is of its first beginning.
    """
    k, text = 6, random_text(41)
    requests, processor = V2Requests(model), front_end(score_params(k), text)
    requests.add("0", text, score_params(k), num_cached=2 * BLOCK)
    processor.update_from_output(core_output(requests.step({"0": 41 - 2 * BLOCK})["0"]))
    flat = processor.prompt_logprobs
    assert prompt_rows(flat, text, 2 * BLOCK, k, num_cached=0) is None
    rows = prompt_rows(flat, text, 2 * BLOCK + 1, k, num_cached=0)
    assert rows is not None
    assert largest_difference(rows, model.rows(text)[2 * BLOCK : -1]) < TOLERANCE


def test_rows_of_other_tokens_are_not_taken(model: TableModel) -> None:
    """As V1 would return for a prompt that is half in memory which another request left."""
    k, text = 6, random_text(20)
    requests, processor = V2Requests(model), front_end(score_params(k), text)
    requests.add("0", text, score_params(k))
    processor.update_from_output(core_output(requests.step({"0": 20})["0"]))
    changed = text.copy()
    changed[10] = (changed[10] + 1) % VOCABULARY_SIZE
    assert prompt_rows(processor.prompt_logprobs, changed, 10, k, num_cached=0) is None
    assert prompt_rows(processor.prompt_logprobs, changed, 11, k, num_cached=0) is not None


# -------------------------------------------------------------------------------------------------- sampled tokens


def write(
    requests: V2Requests, req_id: str, prompt: Ids, num_tokens: int, beside: tuple[str, ...] = ()
) -> list[StepOutput]:
    """The prompt in one step, then token by token; the others decode beside it."""
    outputs = []
    for number in range(num_tokens):
        lengths = {req_id: 1 if number else prompt.size} | dict.fromkeys(beside, 1)
        outputs.append(requests.step(lengths)[req_id])
    return outputs


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_sampled_rows_are_raw_log_probs_of_as_many_tokens_as_were_asked_for(temperature, model: TableModel) -> None:
    """Beside a request that asks for more: vLLM computes one width for the whole batch."""
    k, prompt = 4, random_text(9)
    params = write_params(k, temperature=temperature, seed=5, top_p=0.9, logit_bias={3: -100.0})
    requests, processor = V2Requests(model), front_end(params, prompt)
    requests.add("other", random_text(30, seed=1), write_params(11, temperature=1.0, seed=1))
    requests.step({"other": 30})
    requests.add("0", prompt, params)
    outputs = write(requests, "0", prompt, 12, beside=("other",))
    for output in outputs:
        processor.update_from_output(core_output(output))

    written = np.array([output.token_ids[0] for output in outputs], np.int32)
    expected = model.rows(np.concatenate([prompt, written]))[prompt.size - 1 : -1]
    top = top_rows(processor.logprobs, 0, written.size, k)
    assert top.k == k
    assert (np.diff(top.logprobs, axis=1) <= 0).all()
    assert largest_difference(top, expected) < TOLERANCE
    own = own_logprobs(processor.logprobs)
    assert np.abs(own - expected[np.arange(written.size), written]).max() < TOLERANCE
    assert 3 not in written
    if temperature == 0.0:
        allowed = np.delete(expected, 3, axis=1).max(axis=1)
        assert np.abs(own - allowed).max() < TOLERANCE


def test_what_is_drawn_follows_from_seed_and_position_alone(model: TableModel) -> None:
    """Not from the step, nor from the place in the batch, nor from who else is in it: so a session that is taken up
    again, or a request that was interrupted, writes what it would have written.
    """
    prompt, params = random_text(9), write_params(2, temperature=1.0, seed=7)
    alone = V2Requests(model)
    alone.add("0", prompt, params)
    expected = [output.token_ids[0] for output in write(alone, "0", prompt, 20)]

    crowd = V2Requests(model)
    for number in range(5):
        crowd.add(str(number + 1), random_text(30, seed=number), write_params(2, temperature=1.0, seed=number))
        crowd.step({str(number + 1): 30})
    crowd.add("0", prompt, params)
    assert [o.token_ids[0] for o in write(crowd, "0", prompt, 20, beside=("1", "4"))] == expected

    taken_up = V2Requests(model)  # after 8 tokens, which are now part of its prompt
    text = np.concatenate([prompt, np.array(expected[:8], np.int32)])
    taken_up.add("0", text, params, num_cached=text.size - 1)
    assert [o.token_ids[0] for o in write(taken_up, "0", text[-1:], 12)] == expected[8:]


def test_draws_are_distributed_as_the_model_says(model: TableModel) -> None:
    prompt, num_at_once, num_steps = random_text(9), 8, 250
    expected, counts = np.exp(model.rows(prompt)[-1]), np.zeros(VOCABULARY_SIZE)
    requests = V2Requests(model)
    for step in range(num_steps):
        seeds = range(num_at_once * step, num_at_once * (step + 1))
        for seed in seeds:
            requests.add(str(seed), prompt, write_params(1, temperature=1.0, seed=seed))
        for req_id, output in requests.step({str(seed): prompt.size for seed in seeds}).items():
            counts[output.token_ids[0]] += 1
            requests.remove(req_id)
    num_draws = num_at_once * num_steps
    deviations = np.sqrt(expected * (1 - expected) / num_draws)
    assert (np.abs(counts / num_draws - expected) < 4 * deviations + 1 / num_draws).all()


def test_each_position_draws_anew() -> None:
    """From the same distribution with the same seed."""
    prompt = random_text(9)
    requests = V2Requests(TableModel(spread=0.0))
    requests.add("0", prompt, write_params(1, temperature=1.0, seed=3))
    drawn = [output.token_ids[0] for output in write(requests, "0", prompt, 60)]
    assert len(set(drawn)) > VOCABULARY_SIZE / 2


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_seeds_as_we_derive_them_fit(seed: int, model: TableModel) -> None:
    prompt = random_text(9)
    requests = V2Requests(model)
    requests.add("0", prompt, write_params(1, temperature=1.0, seed=seed))
    assert requests.step({"0": 9})["0"].token_ids


def test_1024_tokens_may_be_excluded_and_one_more_ends_the_engine(model: TableModel) -> None:
    """The error is raised in vLLM's worker, where it ends the engine: lists longer than this must be refused before."""
    requests, prompt = V2Requests(model), random_text(9)
    requests.add("0", prompt, write_params(1, logit_bias=dict.fromkeys(range(1024), -100.0)))
    with pytest.raises(ValueError, match="Too many logit bias tokens: 1025"):
        requests.add("1", prompt, write_params(1, logit_bias=dict.fromkeys(range(1025), -100.0)))
