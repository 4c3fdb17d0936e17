"""Batches as vLLM's Model Runner V2 makes them, for a model that is a table: no engine, no cache, no scheduler.

Who tests a sampler or the prompt's log-probs says how many tokens of which requests are computed in a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers, post_update, prepare_pos_seq_lens
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from common.sequence import Ids
from tests.support import triton_in_torch

VOCABULARY_SIZE = 40
MAX_MODEL_LEN = 128
MAX_NUM_REQUESTS = 16
_NUM_STATES = 997
_DEVICE = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one request gets from a step."""

    token_ids: list[int]  # sampled; none while its prompt is not all computed
    logprobs: LogprobsLists | None  # of these
    prompt_logprobs: LogprobsTensors | None  # in the step in which the prompt is finished


class TableModel:
    """Every distribution follows from a token and its position, so that a row of another token or position is wrong."""

    def __init__(self, *, spread: float = 2.0) -> None:
        random = torch.Generator().manual_seed(0)
        self._logits = spread * torch.randn(_NUM_STATES, VOCABULARY_SIZE, generator=random)

    def hidden_states(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        return (token_ids.long() * 131 + positions) % _NUM_STATES

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self._logits[hidden_states]

    def rows(self, text: Ids) -> np.ndarray:
        """[n, V] nats. Row j is the distribution of token j + 1."""
        states = self.hidden_states(torch.from_numpy(text), torch.arange(text.size))
        return self.compute_logits(states).double().log_softmax(-1).numpy()


class V2Requests:
    """Requests in vLLM's own states, sampled from by vLLM's own sampler and prompt log-prob worker."""

    def __init__(self, model: TableModel) -> None:
        triton_in_torch.register()
        self._model = model
        self._buffers = InputBuffers(MAX_NUM_REQUESTS, 512, _DEVICE)
        self._states = RequestState(
            max_num_reqs=MAX_NUM_REQUESTS,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=512,
            num_speculative_steps=0,
            vocab_size=VOCABULARY_SIZE,
            device=_DEVICE,
        )
        self.sampler = Sampler(VllmConfig(), MAX_NUM_REQUESTS, VOCABULARY_SIZE, _DEVICE, self._states)
        self._prompt_worker = PromptLogprobsWorker(MAX_NUM_REQUESTS, _DEVICE)

    def add(self, req_id: str, text: Ids, params: SamplingParams, *, num_cached: int = 0) -> None:
        """A request whose first tokens are found in the cache."""
        self._states.add_request(req_id, text.size, text.tolist(), num_cached, params.max_tokens)
        slot = self._states.req_id_to_index[req_id]
        self.sampler.add_request(slot, params)
        self._prompt_worker.add_request(req_id, slot, params)
        self._states.apply_staged_writes()
        self.sampler.apply_staged_writes()

    def remove(self, req_id: str) -> None:
        self._states.remove_request(req_id)
        self._prompt_worker.remove_request(req_id)

    def step(self, num_tokens: Mapping[str, int]) -> dict[str, StepOutput]:
        """Compute so many more tokens of each request named."""
        batch = self._batch(num_tokens)
        hidden_states = self._model.hidden_states(batch.input_ids, batch.positions)
        sampled = self.sampler(self._model.compute_logits(hidden_states[batch.logits_indices]), batch)
        prompt_logprobs = self._prompt_worker.compute_prompt_logprobs(
            self._model.compute_logits,
            hidden_states,
            batch,
            self._states.all_token_ids.gpu,
            self._states.num_computed_tokens.gpu,
            self._states.prompt_len.np,
        )
        post_update(
            batch.idx_mapping,
            self._states.num_computed_tokens.gpu,
            self._states.last_sampled_tokens,
            self.sampler.penalties_state.output_bin_counts,
            sampled.sampled_token_ids,
            sampled.num_sampled,
            sampled.num_rejected,
            batch.query_start_loc,
            self._states.all_token_ids.gpu,
            self._states.total_len.gpu,
        )
        self._states.num_computed_tokens_np += np.bincount(
            batch.idx_mapping_np, batch.num_scheduled_tokens, MAX_NUM_REQUESTS
        ).astype(np.int32)
        logprobs = None if sampled.logprobs_tensors is None else sampled.logprobs_tensors.tolists()
        outputs = {}
        for row, req_id in enumerate(batch.req_ids):
            token_ids = sampled.sampled_token_ids[row, : int(sampled.num_sampled[row])].tolist()
            outputs[req_id] = StepOutput(
                token_ids=token_ids,
                logprobs=None if logprobs is None else logprobs.slice_request(row, len(token_ids)),
                prompt_logprobs=prompt_logprobs.get(req_id),
            )
        return outputs

    def _batch(self, num_tokens: Mapping[str, int]) -> InputBatch:
        """As ``GPUModelRunner.prepare_inputs`` makes it."""
        states, num_reqs = self._states, len(num_tokens)
        slots = np.array([states.req_id_to_index[req_id] for req_id in num_tokens], np.intp)
        num_scheduled = np.array(list(num_tokens.values()), np.int32)
        batch = InputBatch.make_dummy(num_reqs, int(num_scheduled.sum()), self._buffers)
        query_start_loc_np = np.concatenate([[0], np.cumsum(num_scheduled)]).astype(np.int32)
        num_computed = np.minimum(states.num_computed_tokens_np, states.prefill_len.np)[slots]
        idx_mapping, query_start_loc = torch.from_numpy(slots), torch.from_numpy(query_start_loc_np)
        first_positions, seq_lens = states.num_computed_tokens.gpu, self._buffers.seq_lens
        prepare_pos_seq_lens(idx_mapping, query_start_loc, first_positions, self._buffers.positions, seq_lens)
        texts = [
            states.all_token_ids.gpu[slot, first : first + length]
            for slot, first, length in zip(slots, first_positions[slots].tolist(), num_scheduled, strict=True)
        ]
        return replace(
            batch,
            req_ids=list(num_tokens),
            idx_mapping=idx_mapping,
            idx_mapping_np=slots,
            expanded_idx_mapping=idx_mapping,
            num_scheduled_tokens=num_scheduled,
            query_start_loc=query_start_loc,
            query_start_loc_np=query_start_loc_np,
            seq_lens=seq_lens[:num_reqs],
            prefill_len_np=states.prefill_len.np[slots],
            num_computed_prefill_tokens_np=num_computed,
            input_ids=torch.cat(texts),
            logits_indices=query_start_loc[1:].long() - 1,
        )


def front_end(params: SamplingParams, prompt: Ids) -> LogprobsProcessor:
    """What gathers a request's log-probs in vLLM's front end."""
    request = EngineCoreRequest(
        request_id="0",
        prompt_token_ids=prompt.tolist(),
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return LogprobsProcessor.from_new_request(tokenizer=None, request=request)
