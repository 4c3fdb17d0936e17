"""Model Runner V2's Triton kernels, written again in torch and numpy, so that its Python runs on a processor.

vLLM takes Model Runner V2 where Triton is, which is on GPUs, and V1 on processors. The two differ in what our engine
reads: rows of prompt log-probs, seeds, limits. Without a GPU none of that could be tested. So here, and only here, a
part of vLLM is replaced: its kernels, through the registry that vLLM has for that (``register_kernels``). All else is
vLLM's own: schedulers, workers, samplers, and how they keep account of rows and requests.

Each function does what its kernel does, for one key-value cache group, without speculative decoding, context
parallelism or padding to a CUDA graph. The digest of the source it was written from stands beside it: where vLLM
changes a kernel, ``register`` fails and names it. Parameters come in the kernels' order; strides and block sizes are
of no use here.
"""

import ctypes
import hashlib
import inspect
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.triton_utils import HAS_TRITON, triton
from vllm.triton_utils.dispatcher import KernelOverride, register_kernels
from vllm.utils.math_utils import next_power_of_2

_PACKAGE = "vllm.v1.worker.gpu"


def register() -> None:
    """Have Model Runner V2 call the functions below in this process. May be called again."""
    assert not HAS_TRITON, "Triton is installed: vLLM's own kernels run"
    # Two things that vLLM's own worker for processors does, or finds in Triton.
    import_module(f"{_PACKAGE}.buffer_utils").UvaBuffer = import_module("vllm.v1.worker.cpu.buffer_utils").UvaBuffer
    triton.next_power_of_2 = next_power_of_2
    new = {name: entry for name, entry in _KERNELS.items() if not isinstance(_find(name), KernelOverride)}
    digests = {name: digest for name, (_, digest) in new.items()} | _CALLED_BY_KERNELS
    changed = [name for name, digest in digests.items() if _digest(name) != digest]
    assert not changed, f"vLLM has changed {', '.join(changed)}: read it and correct what stands in its place here"
    if new:
        register_kernels({f"{_PACKAGE}.{name}": kernel for name, (kernel, _) in new.items()})


def _find(name: str) -> object:
    module, attribute = name.rsplit(".", 1)
    return getattr(import_module(f"{_PACKAGE}.{module}"), attribute)


def _digest(name: str) -> str:
    return hashlib.sha256(inspect.getsource(_find(name)).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------- states, inputs, positions


def apply_write(
    output: Tensor,
    stride: int,
    rows: Tensor,
    columns: Tensor,
    contents: Tensor,
    ends: Tensor,
    groups: None,
    **_: object,
) -> None:
    """Write what was staged, all in one list, each piece to its row from its column on."""
    assert groups is None
    flat, begin = output.view(-1), 0
    for row, column, end in zip(rows.tolist(), columns.tolist(), ends.tolist(), strict=True):
        first = row * stride + column
        flat[first : first + end - begin] = contents[begin:end]
        begin = end


def gather_block_tables(
    idx_mapping: Tensor, sources: Tensor, targets: Tensor, strides: Tensor, num_blocks: Tensor, *_: object, **__: object
) -> None:
    """Copy each scheduled request's row of block numbers to its place in the batch."""
    (stride,) = strides.tolist()
    requests = idx_mapping.tolist()
    source = _table_at(sources, num_rows=max(requests) + 1, stride=stride)
    target = _table_at(targets, num_rows=len(requests), stride=stride)
    for row, request in enumerate(requests):
        length = int(num_blocks[0, request])
        target[row, :length] = source[request, :length]


def compute_slot_mappings(
    max_num_tokens: int, idx_mapping: Tensor, query_start_loc: Tensor, positions: Tensor, tables: Tensor,
    strides: Tensor, block_sizes: Tensor, is_enabled: Tensor, is_sharded: Tensor, slot_mappings: Tensor,
    *_: object, PAD_ID: int, CP_SIZE: int, **__: object,
) -> None:  # fmt: skip
    """Where in the cache the keys and values of each scheduled token go."""
    assert CP_SIZE == 1
    assert is_enabled.all()
    (stride,), (block_size,) = strides.tolist(), block_sizes.tolist()
    requests = idx_mapping.tolist()
    table = _table_at(tables, num_rows=max(requests) + 1, stride=stride)
    slot_mappings[0].fill_(PAD_ID)
    for request, tokens in zip(requests, _slices(query_start_loc), strict=False):
        position = positions[tokens].numpy()
        slots = table[request, position // block_size].astype(np.int64) * block_size + position % block_size
        slot_mappings[0, tokens] = torch.from_numpy(slots)


def prepare_prefill_inputs(
    input_ids: Tensor, next_prefill_tokens: Tensor, stride: int, num_lookahead: int, idx_mapping: Tensor,
    query_start_loc: Tensor, all_token_ids: Tensor, all_stride: int, prefill_len: Tensor, num_computed: Tensor,
    **_: object,
) -> None:  # fmt: skip
    """The input tokens of requests whose prompt is not all computed, and the token that follows each piece of it."""
    assert num_lookahead == 1
    for request, tokens in zip(idx_mapping.tolist(), _slices(query_start_loc), strict=False):
        first, length = int(num_computed[request]), int(prefill_len[request])
        if first >= length:
            continue
        end = first + tokens.stop - tokens.start
        input_ids[tokens] = all_token_ids[request, first:end]
        next_prefill_tokens[0, request] = all_token_ids[request, end] if end < length else 0


def prepare_positions(
    positions: Tensor, seq_lens: Tensor, idx_mapping: Tensor, query_start_loc: Tensor, num_computed: Tensor,
    *_: object, **__: object,
) -> None:  # fmt: skip
    """Each token's place in its text, and how long the texts are after this step."""
    seq_lens[idx_mapping.shape[0] :] = 0
    for row, (request, tokens) in enumerate(zip(idx_mapping.tolist(), _slices(query_start_loc), strict=False)):
        first = int(num_computed[request])
        end = first + tokens.stop - tokens.start
        seq_lens[row] = end
        positions[tokens] = torch.arange(first, end, dtype=positions.dtype)


def combine_sampled_and_draft_tokens(
    input_ids: Tensor, idx_mapping: Tensor, last_sampled: Tensor, query_start_loc: Tensor, seq_lens: Tensor,
    prefill_len: Tensor, draft_tokens: Tensor, draft_stride: int, cu_num_logits: Tensor, logits_indices: Tensor,
    **_: object,
) -> None:  # fmt: skip
    """Each request's last row is the one to sample from; what a decoding request reads is what it sampled last."""
    assert draft_tokens.shape[1] == 0
    num_reqs = idx_mapping.shape[0]
    last_rows = query_start_loc[1 : num_reqs + 1].long() - 1
    logits_indices.copy_(last_rows)
    decodes = seq_lens[:num_reqs] > prefill_len[idx_mapping]
    input_ids[last_rows[decodes]] = last_sampled[idx_mapping[decodes], 0].to(input_ids.dtype)


def get_num_sampled_and_rejected(
    num_sampled: Tensor, num_rejected: Tensor, seq_lens: Tensor, cu_num_logits: Tensor, idx_mapping: Tensor,
    prefill_len: Tensor, **_: object,
) -> None:  # fmt: skip
    """Nothing is sampled while a part of the prompt is still to be computed."""
    is_chunk = seq_lens[: idx_mapping.shape[0]] < prefill_len[idx_mapping]
    num_sampled[is_chunk] = 0
    num_rejected.copy_(torch.where(is_chunk, 0, cu_num_logits.diff() - num_sampled))


def post_update(
    idx_mapping: Tensor, num_computed: Tensor, last_sampled: Tensor, bin_counts: Tensor | None, bin_stride: int,
    sampled: Tensor, sampled_stride: int, num_sampled: Tensor, num_rejected: Tensor, query_start_loc: Tensor,
    all_token_ids: Tensor, all_stride: int, total_len: Tensor, **_: object,
) -> None:  # fmt: skip
    """Append what was sampled to each request's text and count what was computed."""
    assert bin_counts is not None
    for row, (request, tokens) in enumerate(zip(idx_mapping.tolist(), _slices(query_start_loc), strict=False)):
        if num_sampled[row]:
            token_id, end = int(sampled[row, 0]), int(total_len[request])
            last_sampled[request] = token_id
            all_token_ids[request, end : end + 1] = token_id  # nothing where the context is full
            bin_counts[request, token_id] += 1
            total_len[request] += 1
        num_computed[request] += tokens.stop - tokens.start - int(num_rejected[row])


# ---------------------------------------------------------------------------------------------------- log-probs, ranks


def topk_log_softmax(
    output: Tensor, logits: Tensor, logits_stride: int, token_ids: Tensor, *_: object, **__: object
) -> None:
    """Log-probs of chosen tokens, of the logits as they are."""
    output.copy_(logits.float().log_softmax(-1).gather(-1, token_ids))


def ranks(output: Tensor, logits: Tensor, logits_stride: int, token_ids: Tensor, vocab_size: int, **_: object) -> None:
    """How many tokens are as likely as the chosen one or more so, itself included."""
    output.copy_((logits >= logits.gather(-1, token_ids.view(-1, 1).long())).sum(-1))


def prompt_logprobs_token_ids(
    output: Tensor, query_start_loc: Tensor, idx_mapping: Tensor, num_computed: Tensor, all_token_ids: Tensor,
    *_: object, **__: object,
) -> None:  # fmt: skip
    """The token that follows each scheduled one. The last one's is read past the text; nobody uses it."""
    output.zero_()
    for request, tokens in zip(idx_mapping.tolist(), _slices(query_start_loc), strict=False):
        first = int(num_computed[request]) + 1
        following = all_token_ids[request, first : first + tokens.stop - tokens.start]
        output[tokens.start : tokens.start + following.numel()] = following


# ------------------------------------------------------------------------------------------------------------- sampling


def temperature(
    logits: Tensor, stride: int, idx_mapping: Tensor, temperatures: Tensor, *_: object, **__: object
) -> None:
    """Divide by the temperature, but for greedy requests."""
    values = temperatures[idx_mapping]
    logits /= torch.where(values == 0.0, 1.0, values)[:, None]


def bias(
    logits: Tensor, stride: int, vocab_size: int, idx_mapping: Tensor,
    num_allowed: Tensor, allowed: Tensor, allowed_stride: int,
    num_biased: Tensor, biased: Tensor, biased_stride: int, biases: Tensor, bias_stride: int,
    positions: Tensor, min_lens: Tensor, num_stops: Tensor, restores: Tensor, stops: Tensor, stop_stride: int,
    CHECK_ALL_MASKED_ROWS: bool, **_: object,
) -> None:  # fmt: skip
    """Keep only allowed tokens, add biases, and forbid stop tokens before the least length."""
    assert not CHECK_ALL_MASKED_ROWS
    for row, request in enumerate(idx_mapping.tolist()):
        if num_ids := int(num_allowed[request]):
            kept = allowed[request, :num_ids].long()
            values = logits[row, kept]
            logits[row] = -torch.inf
            logits[row, kept] = values
        if num_ids := int(num_biased[request]):
            logits[row, biased[request, :num_ids].long()] += biases[request, :num_ids]
        if (num_ids := int(num_stops[request])) and positions[row] + 1 < min_lens[request]:
            logits[row, stops[request, :num_ids].long()] = -torch.inf


def gumbel_sample(
    local_argmax: Tensor, argmax_stride: int, local_max: Tensor, max_stride: int, cache: None, *arguments: object,
    BLOCK_SIZE: int, IS_DRAFTING: bool, APPLY_TEMPERATURE: bool, USE_FP64: bool, **_: object,
) -> None:  # fmt: skip
    """The best token of each block of the vocabulary, after noise that follows from (seed, position, token) alone."""
    assert cache is None
    assert (IS_DRAFTING, USE_FP64, APPLY_TEMPERATURE) == (False, False, False)
    logits, _, idx_mapping, seeds, positions, temperatures, vocab_size = arguments[5:]
    is_random = (temperatures[idx_mapping] != 0.0)[:, None]
    noise = torch.from_numpy(gumbel_noise(seeds[idx_mapping].numpy(), positions.numpy(), vocab_size))
    values = logits.float() + torch.where(is_random, noise, 0.0)
    num_blocks = local_argmax.shape[1]
    blocks = torch.full((values.shape[0], num_blocks * BLOCK_SIZE), -torch.inf)
    blocks[:, :vocab_size] = values
    best = blocks.view(-1, num_blocks, BLOCK_SIZE).max(dim=-1)
    local_max.copy_(best.values)
    local_argmax.copy_(best.indices + BLOCK_SIZE * torch.arange(num_blocks))


def gumbel_noise(
    seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], vocab_size: int
) -> npt.NDArray[np.float32]:
    """[n, V] for n pairs of seed and position: MurmurHash3 of (seed, position, token), as a Gumbel variable."""
    low_bits = np.int64(0xFFFFFFFF)
    keys = [seeds & low_bits, (seeds >> 32) & low_bits, positions & low_bits]
    state = np.zeros((seeds.size, 1), np.uint32)
    for key in keys:
        state = _murmur_mix(state, key.astype(np.uint32)[:, None])
    state = _murmur_mix(state, np.arange(vocab_size, dtype=np.uint32)[None, :]) ^ np.uint32(16)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = (state ^ (state >> np.uint32(shift))) * np.uint32(factor)
    state ^= state >> np.uint32(16)
    high, low = (state >> np.uint32(16)).astype(np.float32), (state & np.uint32(0xFFFF)).astype(np.float32)
    uniform = high * np.float32(2**-16) + (low + np.float32(0.5)) * np.float32(2**-32)
    noise: npt.NDArray[np.float32] = -np.log(-np.log1p(-uniform))
    return noise


def _murmur_mix(state: npt.NDArray[np.uint32], key: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    key = _rotated(key * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    return _rotated(state ^ key, 13) * np.uint32(5) + np.uint32(0xE6546B64)


def _rotated(values: npt.NDArray[np.uint32], num_bits: int) -> npt.NDArray[np.uint32]:
    return (values << np.uint32(num_bits)) | (values >> np.uint32(32 - num_bits))


# -------------------------------------------------------------------------------------------------------------- helpers


def _slices(query_start_loc: Tensor) -> list[slice]:
    """Each request's scheduled tokens in the batch."""
    return [slice(start, end) for start, end in pairwise(query_start_loc.tolist())]


def _table_at(pointers: Tensor, *, num_rows: int, stride: int) -> npt.NDArray[np.int32]:
    """[num_rows, stride] The memory behind the one cache group's pointer."""
    (address,) = pointers.tolist()
    return np.ctypeslib.as_array((ctypes.c_int32 * (num_rows * stride)).from_address(address)).reshape(num_rows, stride)


_KERNELS: dict[str, tuple[Callable[..., None], str]] = {
    "buffer_utils._apply_write_kernel": (apply_write, "8f46fe0cc989"),
    "block_table._gather_block_tables_kernel": (gather_block_tables, "e9f87a675c06"),
    "block_table._compute_slot_mappings_kernel": (compute_slot_mappings, "a20a277ea0a5"),
    "input_batch._prepare_prefill_inputs_kernel": (prepare_prefill_inputs, "96d1b0d0dffd"),
    "input_batch._prepare_pos_seq_lens_kernel": (prepare_positions, "33c07567a9fe"),
    "input_batch._combine_sampled_and_draft_tokens_kernel": (combine_sampled_and_draft_tokens, "c02435e0be07"),
    "input_batch._get_num_sampled_and_rejected_kernel": (get_num_sampled_and_rejected, "17bfac5e1599"),
    "input_batch._post_update_kernel": (post_update, "1f8738a0c9e9"),
    "sample.logprob._topk_log_softmax_kernel": (topk_log_softmax, "535eb7c043db"),
    "sample.logprob._ranks_kernel": (ranks, "9bb31889efc6"),
    "sample.prompt_logprob._prompt_logprobs_token_ids_kernel": (prompt_logprobs_token_ids, "2706dbdcfea5"),
    "sample.gumbel._temperature_kernel": (temperature, "47f8e146ba43"),
    "sample.gumbel._gumbel_sample_kernel": (gumbel_sample, "5099ce70cece"),
    "sample.logit_bias._bias_kernel": (bias, "d8897887756b"),
}
"""Each kernel, what stands in its place, and the digest of the source that was written from."""

_CALLED_BY_KERNELS = {
    "sample.gumbel._murmur3_rotl32": "dcd0627fdcf1",
    "sample.gumbel._murmur3_mix": "20bd95bae6c0",
    "sample.gumbel._murmur3_fmix32": "7f19359eeee2",
    "sample.gumbel.murmur3_hash32": "067292f56edc",
    "sample.gumbel.murmur3_uniform32": "b5803fd98fee",
    "sample.gumbel._log1p_neg_stable": "acf42252ee3d",
    "sample.gumbel.gumbel_noised_argmax": "07e181ff753d",
    "sample.gumbel.gumbel_block_argmax": "7d8eb062d2a6",
}
"""What the kernels above call, and its digest."""
