"""vLLM's worker for processors with Model Runner V2 in it. Imported by vLLM's own processes, as ``worker_cls`` says."""

from vllm.v1.worker.cpu_worker import CPUWorker  # first: it puts torch calls for GPUs out of Model Runner V2's way

from tests.support import triton_in_torch


class V2Worker(CPUWorker):
    """vLLM's own; its kernels are ``triton_in_torch``'s."""

    def init_device(self) -> None:
        triton_in_torch.register()
        super().init_device()
