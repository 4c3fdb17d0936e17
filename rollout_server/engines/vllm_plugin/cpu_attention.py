"""vLLM's CPU attention with KV-cache blocks of 16 tokens, as on GPUs.

Prefixes are reused in whole blocks. The teacher scores a growing text repeatedly, so each time it computes up to one
block again. vLLM's CPU kernels support blocks of 16, but its backend only offers multiples of 32, which are slightly
faster. This backend offers 16 and replaces vLLM's through its backend registry. Engines with larger blocks are not
affected. Imported in vLLM's own processes.
"""

from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

BLOCK_TOKENS = 16


class CPUAttentionInSmallBlocks(CPUAttentionBackend):  # type: ignore[misc]  # vLLM is not typed here
    """vLLM's CPU backend with smaller block sizes."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_TOKENS)]


def register() -> None:
    """Replace vLLM's CPU backend with this one."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{CPUAttentionInSmallBlocks.__name__}")
