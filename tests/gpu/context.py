"""What checks share in their process: the device, models made once, one engine at a time, one event loop.

torch, transformers and vLLM are imported where they are needed: a part begins with what it uses.
"""

import asyncio
import gc
import os
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import yaml

from tests.gpu.records import NotRun

if TYPE_CHECKING:
    import torch

    from rollout_server.engines.vllm import VLLMEngine
    from tests.gpu.models import Shape

T = TypeVar("T")

GIB = 2**30


class Context:
    """Ends its engine when it is left."""

    def __init__(self, device: str, folder: Path, engine: tuple[str, ...] = ()) -> None:
        self.is_cuda = device == "cuda"
        self.folder = folder
        self._engine_settings = {key: yaml.safe_load(value) for key, _, value in (it.partition("=") for it in engine)}
        self._runner = asyncio.Runner()
        self._engine: tuple[str, VLLMEngine] | None = None  # with what it was made from

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_engine()
        self._runner.close()

    @property
    def device(self) -> "torch.device":
        import torch

        return torch.device("cuda" if self.is_cuda else "cpu")

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """On the one event loop, to which the engine belongs."""
        return self._runner.run(work)

    def model(self, shape: "Shape", dtype: Literal["float32", "bfloat16"] = "float32", *, seed: int = 0) -> Path:
        """A folder with a random model of that shape, made at the first call."""
        from tests.gpu.models import make_model

        folder = self.folder / f"{shape.hidden}-{shape.vocabulary}-{dtype}-{seed}"
        if not (folder / "config.json").exists():
            make_model(shape, folder, device=self.device, dtype=dtype, seed=seed)
        return folder

    def engine(
        self, model: Path, *, top_logprobs: int, backend: str | None = None, gpu: int = 0, **settings: Any
    ) -> "VLLMEngine":
        """A started engine with these ``EngineSettings``; the one before is ended, unless it is the same."""
        from common.config import EngineSettings
        from rollout_server.engines.protocol import EngineSpec
        from rollout_server.engines.vllm import VLLMEngine

        wanted = {**self._defaults(), **settings, **self._engine_settings}
        key = repr((model, top_logprobs, backend, gpu, sorted(wanted.items())))
        if self._engine is not None and self._engine[0] == key:
            return self._engine[1]
        self.end_engine()
        spec = EngineSpec(
            name="engine",
            model=str(model),
            settings=EngineSettings(**wanted),
            top_logprobs=top_logprobs,
            weight_transfer_backend=backend,
        )

        async def start() -> VLLMEngine:
            return VLLMEngine.start(spec)

        with _visible(gpu) if self.is_cuda else nullcontext():
            self._engine = key, self.run(start())
        return self._engine[1]

    def end_engine(self) -> None:
        if self._engine is not None:
            self._engine[1].shutdown()
            self._engine = None

    def wait_for_device(self) -> None:
        """Return when it has done all that it was given."""
        import torch

        if self.is_cuda:
            torch.cuda.synchronize()

    def free_memory(self) -> None:
        """Give back what torch keeps of the GPU for later."""
        import torch

        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def needs_gib(self, num_gib: float) -> None:
        """NotRun unless so much of the GPU is free, once the engine of the checks before has ended."""
        import torch

        self.end_engine()
        self.free_memory()
        free_gib = torch.cuda.mem_get_info()[0] / GIB
        if free_gib < num_gib:
            raise NotRun(f"needs {num_gib:g} GiB of the GPU, {free_gib:.1f} are free")

    def needs_cuda(self, why: str) -> None:
        """NotRun on a processor."""
        if not self.is_cuda:
            raise NotRun(why)

    def _defaults(self) -> dict[str, Any]:
        """Caches of a known size, so that engine and learner find room side by side."""
        shared = {"max_num_seqs": 64, "kv_cache_gib": 4.0 if self.is_cuda else 0.25}
        return {**shared, "gpu_memory_utilization": 0.5} if self.is_cuda else shared


@contextmanager
def _visible(gpu: int) -> Iterator[None]:
    """Only this GPU for processes that begin now; torch in this one has seen its own already. Put back afterwards."""
    import torch

    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = before.split(",") if before else [str(index) for index in range(torch.cuda.device_count())]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[gpu]
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
