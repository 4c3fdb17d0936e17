"""The engine's side of CUDA IPC: vLLM's own backend, with the handles passed as plain values.

For a learner on the engine's GPU: its tensors are loaded from GPU memory directly. Imported only if torch is built with
CUDA.
"""

from typing import Any

from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo

from common.ipc_handles import rebuilt_handles


class PlainIpcWeightTransferEngine(IPCWeightTransferEngine):  # type: ignore[misc]
    """Runs in the engine's worker."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        return super().parse_update_info(rebuilt_handles(update_dict))
