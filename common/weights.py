"""The student's weight version, and what travels from the learner to the engines at a weight sync."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SyncBackend = Literal["host_memory", "ipc", "nccl"]
"""How the tensors travel: a file in shared memory, CUDA IPC between processes on one GPU, or an NCCL group."""

NCCL_BUFFER_BYTES = 64 * 2**20
NCCL_NUM_BUFFERS = 2
"""``nccl`` packs tensors into buffers of this size. vLLM's own, two of 1 GiB, are more than an engine with
``gpu_memory_utilization`` 0.9 leaves free on a GPU of 24 GiB."""

WeightVersion = int
"""Counts the weight syncs of a run: 0 for the weights the engines loaded at start. They are sent too, where a run goes
back to its beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """One update as an engine receives it.

    ``transfer_info`` is what the weight-transfer backend needs to find the tensors: the file's path for
    ``host_memory``; names, dtypes and shapes for ``nccl``; for ``ipc`` the handles, too. The tensors themselves never
    pass through here.
    """

    version: WeightVersion
    transfer_info: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.version >= 0, f"version must be >= 0, got {self.version}"


def nccl_buffer_bytes(largest_tensor_bytes: int) -> int:
    """The most that learner and engine each hold while ``nccl`` sends, besides the model: one buffer more than there
    are, for a new one is made while the old ones exist. A buffer is exceeded by at most one tensor.
    """
    return (NCCL_NUM_BUFFERS + 1) * (NCCL_BUFFER_BYTES + largest_tensor_bytes)
