"""The engine's side of the weight transfer: a vLLM backend through host memory, and the steps of one update.

The backend is for machines without an NCCL group of learner and engine (no GPU, or a test). The learner writes a
safetensors file into shared memory, and every worker of the engine reads it. vLLM loads this module in each of its own
processes (entry point ``vllm.general_plugins``). It does not depend on how the file is written, or on the replica.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferInitRequest,
    WeightTransferUpdateInfo,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from common.weights import SyncBackend, WeightUpdate
from rollout_server.engines.vllm_plugin.lifeline import end_with_parent

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

HOST_MEMORY = "host_memory"
PLAIN_IPC = "plain_ipc"


def register() -> None:
    """Set up each of vLLM's own processes: register the weight-transfer backends and the small CPU blocks, and end the
    process with its parent. vLLM may call it more than once.
    """
    end_with_parent()
    if current_platform.is_cpu():
        from rollout_server.engines.vllm_plugin import cpu_attention  # its kernels exist only on CPUs

        cpu_attention.register()
    with contextlib.suppress(ValueError):  # raised by vLLM if the name is already registered
        WeightTransferEngineFactory.register_engine(HOST_MEMORY, __name__, "HostMemoryWeightTransferEngine")
        WeightTransferEngineFactory.register_engine(
            PLAIN_IPC, "rollout_server.engines.vllm_plugin.ipc", "PlainIpcWeightTransferEngine"
        )


def engine_backend(backend: SyncBackend) -> str:
    """The name of the engine's backend in vLLM."""
    return PLAIN_IPC if backend == "ipc" else backend


async def init_transfer(engine: "AsyncLLM", transfer_info: Mapping[str, object]) -> None:
    """Open the engine's end of the transfer, once, before the first update. Raises on failure."""
    await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=dict(transfer_info)))


class UpdateRefused(RuntimeError):
    """The engine rejected an update. It continues with its old weights."""


class WeightsLost(RuntimeError):
    """An update failed half-way, so some layers may have no data. The engine must be restarted before its next step."""


async def apply_update(engine: "AsyncLLM", update: WeightUpdate) -> None:
    """Load new weights between two engine steps. Running requests wait, then continue with the new weights.

    ``keep`` freezes the requests, and ``clear_cache=True`` frees all their KV-cache blocks. When they resume, the whole
    context is computed again with the new weights, so no token is sampled from the old weights' cache. (With
    ``clear_cache=False`` a running request would keep its old cache, and the prefix cache can't be reset while the
    request holds blocks.) Tokens generated before the update are kept.

    Raises UpdateRefused if every layer is unchanged; the engine is then resumed. Raises WeightsLost if the update
    failed or was cancelled after it started; the engine then stays paused. One call at a time per engine.
    """
    try:
        await engine.pause_generation(mode="keep", clear_cache=True)
    except BaseException:
        await engine.resume_generation()
        raise
    try:
        await _load(engine, update)
    except UpdateRefused:
        await engine.resume_generation()
        raise
    except BaseException as error:
        reason = str(error) or type(error).__name__
        raise WeightsLost(f"the update to weight version {update.version} failed half-way: {reason}") from error
    await engine.resume_generation()


async def _load(engine: "AsyncLLM", update: WeightUpdate) -> None:
    await engine.start_weight_update()
    try:
        await engine.update_weights(WeightTransferUpdateRequest(update_info=dict(update.transfer_info)))
    except Exception as error:
        if _rolls_back(engine):
            raise UpdateRefused(str(error)) from error
        raise
    await engine.finish_weight_update(weight_version=str(update.version))
    if not await engine.reset_prefix_cache():
        raise RuntimeError("the prefix cache still holds blocks of the old weights")


def _rolls_back(engine: "AsyncLLM") -> bool:
    """Whether the engine's worker restores its weights when an update fails.

    ``host_memory`` does (see below). But if there are several workers, one may fail while the others succeed, and
    vLLM's own backends leave the remaining layers without data.
    """
    config = engine.vllm_config
    return bool(config.weight_transfer_config.backend == HOST_MEMORY and config.parallel_config.world_size == 1)


@dataclass
class HostMemoryInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Sent once by the learner: the folder of its weight files."""

    folder: str


@dataclass
class HostMemoryUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Sent per update: the file with every whole tensor under its Hugging Face name."""

    path: str


class HostMemoryWeightTransferEngine(WeightTransferEngine[HostMemoryInitInfo, HostMemoryUpdateInfo]):  # type: ignore[misc]
    """Reads each update from a safetensors file. Runs in every worker. Under tensor parallelism each worker reads the
    same file, and the model's own loader keeps the worker's shard.
    """

    init_info_cls = HostMemoryInitInfo
    update_info_cls = HostMemoryUpdateInfo

    def init_transfer_engine(self, init_info: HostMemoryInitInfo) -> None:
        """Check that the learner's shared memory is on this machine. There is nothing to open."""
        if not Path(init_info.folder).is_dir():
            raise FileNotFoundError(
                f"weight folder {init_info.folder} does not exist: host_memory needs learner and engine on one machine "
                "(and in one container, or with the same /dev/shm); use sync.backend = nccl across machines"
            )

    def start_weight_update(self) -> None:
        """Restore the parameters' layout from before loading, because packed parameters can't be written to."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Like vLLM's own method, which requires an accelerator. A failed update leaves no layer half written: each
        layer is either new or unchanged, and the engine can run."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self._drop_half_loaded_layers()
            self.finish_weight_update()
            raise
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: HostMemoryUpdateInfo) -> None:
        """Load the file. FileNotFoundError if it does not exist, ValueError if it does not match the engine's model."""
        path = Path(update_info.path)
        if not path.is_file():
            raise FileNotFoundError(f"weight file {path} does not exist: the learner should have written it")
        # Before loading, because a loaded layer returns to its packed layout, whose parameters may have other names.
        expected_names = {name for name, _ in self.model.named_parameters()}
        reading = _Reading(path)
        try:
            loaded_names = self.model.load_weights(iter(reading))
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            reason = str(error) or "wrong shape"  # vLLM's loaders assert without a message
            raise ValueError(
                f"weight file {path.name}: {reading.current} does not fit the engine's model ({reason}); "
                f"expected the names and whole shapes of a checkpoint of {self.model_config.model}"
            ) from error
        missing_names = expected_names - self._optional_names() - loaded_names if loaded_names is not None else set()
        if missing_names and self.model_config.quantization is None:
            raise ValueError(
                f"weight file {path.name} lacks {', '.join(sorted(missing_names))}; "
                f"expected every parameter of {self.model_config.model}"
            )

    def finish_weight_update(self) -> None:
        """Pack the loaded layers in place, and restore the others."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """No resources are held between updates."""

    def _optional_names(self) -> set[str]:
        """Parameters that a checkpoint may omit, as in vLLM's own check at start: a head tied to the embedding.

        During a reload the two are separate, so a file without the head leaves the old head in place. Only the probe
        detects that.
        """
        return {"lm_head.weight"} if self.model_config.hf_text_config.tie_word_embeddings else set()

    def _drop_half_loaded_layers(self) -> None:
        """Discard pending tensors of half-loaded layers, so that finishing the update restores their old tensors."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        for module in self.model.modules():
            layer = get_layerwise_info(module)
            if layer.can_load():
                layer.loaded_weights.clear()
                layer.load_numel = 0


class _Reading:
    """Iterates over a file's tensors and remembers the current one. Memory-mapped, so that workers share the pages."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.current = "the file"

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(self._path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                self.current = f"{name} {list(tensor.shape)}"
                yield name, tensor
