"""The student's weight version, and the update that the learner sends to the engines at a weight sync."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SyncBackend = Literal["host_memory", "ipc", "nccl"]
"""How tensors are sent: in a file in shared memory, by CUDA IPC between processes on one GPU, or in an NCCL group."""

NCCL_BUFFER_BYTES = 64 * 2**20
NCCL_NUM_BUFFERS = 2
"""Size and number of the buffers into which ``nccl`` packs tensors. vLLM's default, two of 1 GiB, is more than an
engine with ``gpu_memory_utilization`` 0.9 leaves free on a GPU of 24 GiB."""

WeightVersion = int
"""Number of weight syncs in a run: 0 for the weights that the engines loaded at start. Those are also sent if a run
goes back to its beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """One update as an engine receives it.

    ``transfer_info`` is what the weight-transfer backend needs to find the tensors: the file's path for
    ``host_memory``; names, dtypes and shapes for ``nccl``; also the handles for ``ipc``. The tensors themselves are not
    in it.
    """

    version: WeightVersion
    transfer_info: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.version >= 0, f"version must be >= 0, got {self.version}"


def nccl_buffer_bytes(largest_tensor_bytes: int) -> int:
    """Maximum memory of the buffers that learner and engine each hold while ``nccl`` sends. It is one buffer more than
    ``NCCL_NUM_BUFFERS``, because a new buffer is allocated while the old ones exist. A buffer exceeds its size by at
    most one tensor.
    """
    return (NCCL_NUM_BUFFERS + 1) * (NCCL_BUFFER_BYTES + largest_tensor_bytes)
