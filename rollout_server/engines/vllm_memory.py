"""How many tokens an engine step may compute, given the memory for scoring. Pure arithmetic; imports no vLLM.

vLLM profiles the memory of a forward pass before it sizes its KV cache, but does not include the memory for prompt
log-probs. Here that memory is part of the engine's share of the GPU, so that an engine never uses more than its share:
vLLM gets the share minus ``Scoring.bytes_for``.
"""

from dataclasses import dataclass

GIB = 2**30
_PIECE_ROWS = 1024  # vllm/v1/worker/gpu/sample/prompt_logprob.py, CHUNK_SIZE
_LOGIT_COPIES = 3
_ENTRY_BYTES = 8 + 4  # an id and a log-prob
_LARGE_GPU_BYTES = 70 * GIB  # from this size vLLM's own default for offline batches is 16,384
_SCORING_SHARE = 0.1
_FEWEST_TOKENS = 2048  # vLLM's own default


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """The memory for prompt log-probs, in addition to the forward pass."""

    vocabulary: int
    top_logprobs: int  # k
    dtype_bytes: int  # per logit
    in_pieces: bool  # as in Model Runner V2, vLLM's default on GPUs

    def bytes_for(self, num_tokens: int) -> int:
        """Bytes on each GPU for a step with ``num_tokens`` tokens.

        Model Runner V2 computes 1,024 positions at a time, in the model's dtype: the logits, a contiguous copy for
        top-k, and the buffer for gathering them under tensor parallelism. For bfloat16 and a vocabulary of 152,000 this
        is 1,024 x 152,000 x 2 x 3 bytes = 0.87 GiB, whatever the step size. Model Runner V1 computes all positions at
        once, in the model's dtype and in float32 (vLLM pull request 52054): 8,192 x 152,000 x (2 + 4) bytes = 7 GiB.
        Both keep k + 1 ids and log-probs per position, and two copies of them during concatenation.
        """
        if self.in_pieces:
            logits = min(num_tokens, _PIECE_ROWS) * self.vocabulary * self.dtype_bytes * _LOGIT_COPIES
        else:
            logits = num_tokens * self.vocabulary * (self.dtype_bytes + 4)
        return logits + 2 * num_tokens * (self.top_logprobs + 1) * _ENTRY_BYTES


def batched_tokens(
    scoring: Scoring, *, setting: int | None, gpu_bytes: int, engine_bytes: int, max_num_seqs: int
) -> int:
    """Maximum number of tokens per step of an engine on GPUs (vLLM's ``max_num_batched_tokens``).

    This is ``setting`` if given. Otherwise it is 8,192, or 16,384 on GPUs of 70 GiB and more. It is halved until
    scoring takes at most a tenth of the engine's share, but not below vLLM's own 2,048: an engine too small for 1,024
    positions' logits is too small for long steps as well. It is at least ``max_num_seqs``, because a decode step
    computes one token per sequence.
    """
    if setting is not None:
        return setting
    num_tokens = 16384 if gpu_bytes >= _LARGE_GPU_BYTES else 8192
    while num_tokens > _FEWEST_TOKENS and scoring.bytes_for(num_tokens) > _SCORING_SHARE * engine_bytes:
        num_tokens //= 2
    return max(num_tokens, max_num_seqs)
