"""vLLM's attention on processors in key-value blocks of 16 tokens, as on GPUs.

Prefixes are reused in whole blocks, so whoever reads a text again and again, as the teacher does, computes up to a
block twice each time. vLLM's kernels for processors can do blocks of 16; its backend only offers multiples of 32,
which attend a little faster. So a backend that offers 16 takes its place (vLLM's registry is made for that). An engine
with larger blocks gets what it always got. Imported in vLLM's own processes.
"""

from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

BLOCK_TOKENS = 16


class CPUAttentionInSmallBlocks(CPUAttentionBackend):  # type: ignore[misc]  # vLLM is not typed here
    """vLLM's own, with smaller blocks on offer."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_TOKENS)]


def register() -> None:
    """Have vLLM take this backend for its own on processors."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{CPUAttentionInSmallBlocks.__name__}")
