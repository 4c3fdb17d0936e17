"""The engine's half of CUDA IPC: vLLM's own, given the handles as plain values.

For a learner on the engine's GPU: what it shares is loaded from where it lies. Not imported where there is no CUDA
build of torch, for nothing there asks for it.
"""

from typing import Any

from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo

from common.ipc_handles import rebuilt_handles


class PlainIpcWeightTransferEngine(IPCWeightTransferEngine):  # type: ignore[misc]
    """Lives in the engine's worker."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        return super().parse_update_info(rebuilt_handles(update_dict))
