"""The engine's half of the weight transfer: a vLLM backend through host memory, and one update from start to end.

The backend is for machines where learner and engine share no NCCL group (no GPU, or a test): the learner writes a
safetensors file into shared memory, every worker of the engine reads it. vLLM loads this module in each of its own
processes (entry point ``vllm.general_plugins``). It must not know how the file got there, nor which replica it serves.
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
    """What each of vLLM's own processes needs of us: the weight-transfer backends written here, small blocks on
    processors, and an end when its parent ends. vLLM may call it more than once.
    """
    end_with_parent()
    if current_platform.is_cpu():
        from rollout_server.engines.vllm_plugin import cpu_attention  # its kernels exist on processors alone

        cpu_attention.register()
    with contextlib.suppress(ValueError):  # what vLLM raises when the name is taken
        WeightTransferEngineFactory.register_engine(HOST_MEMORY, __name__, "HostMemoryWeightTransferEngine")
        WeightTransferEngineFactory.register_engine(
            PLAIN_IPC, "rollout_server.engines.vllm_plugin.ipc", "PlainIpcWeightTransferEngine"
        )


def engine_backend(backend: SyncBackend) -> str:
    """The name under which vLLM knows an engine's half."""
    return PLAIN_IPC if backend == "ipc" else backend


async def init_transfer(engine: "AsyncLLM", transfer_info: Mapping[str, object]) -> None:
    """Open the engine's end of the transfer, once, before the first update. Raises if it can't be opened."""
    await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=dict(transfer_info)))


class UpdateRefused(RuntimeError):
    """An update that the engine could not take. It goes on under the weights it had."""


class WeightsLost(RuntimeError):
    """An update that ended half-way: layers may be without data, and no step may run on them. Restart the engine."""


async def apply_update(engine: "AsyncLLM", update: WeightUpdate) -> None:
    """Take new weights between two steps of the engine. Requests in flight wait, then go on under the new weights.

    ``keep`` freezes requests where they are, and ``clear_cache=True`` takes all their key-value blocks from them: on
    resuming, each one's whole context is computed again with the new weights, so that no token is sampled from a cache
    of the old ones. (With ``clear_cache=False`` a running request goes on with its old cache, and the prefix cache
    can't be cleared while the request holds blocks.) What a request wrote before stays as it is.

    Raises UpdateRefused where every layer is as it was before; the engine is resumed then. Raises WeightsLost where the
    update failed, or was cancelled, after it had begun: the engine stays paused. One call at a time per engine.
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
        raise RuntimeError("the prefix cache still holds blocks of the weights before")


def _rolls_back(engine: "AsyncLLM") -> bool:
    """Whether an update that fails in the engine's worker leaves its weights as they were.

    ``host_memory`` does (see below). But of several workers one may fail while the others load; and vLLM's own backends
    leave the layers that they did not come to without data.
    """
    config = engine.vllm_config
    return bool(config.weight_transfer_config.backend == HOST_MEMORY and config.parallel_config.world_size == 1)


@dataclass
class HostMemoryInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """What the learner says once: where its files will be."""

    folder: str


@dataclass
class HostMemoryUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What the learner says per update: the file with every tensor whole, under its Hugging Face name."""

    path: str


class HostMemoryWeightTransferEngine(WeightTransferEngine[HostMemoryInitInfo, HostMemoryUpdateInfo]):  # type: ignore[misc]
    """Reads each update from a safetensors file. Lives in every worker; under tensor parallelism each reads the same
    file and the model's own loader keeps the worker's shard.
    """

    init_info_cls = HostMemoryInitInfo
    update_info_cls = HostMemoryUpdateInfo

    def init_transfer_engine(self, init_info: HostMemoryInitInfo) -> None:
        """Nothing to open. Fails early where the learner's shared memory isn't this machine's."""
        if not Path(init_info.folder).is_dir():
            raise FileNotFoundError(
                f"weight folder {init_info.folder} is not there: host_memory needs learner and engine on one machine "
                "(and in one container, or with the same /dev/shm); use sync.backend = nccl across machines"
            )

    def start_weight_update(self) -> None:
        """Bring the parameters back to the layout they were loaded in; packed ones can't be written to."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """vLLM's own waits for an accelerator, which need not be there. An update that fails leaves no layer half
        written: each one is wholly new or as it was, and the engine can run."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self._drop_half_loaded_layers()
            self.finish_weight_update()
            raise
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: HostMemoryUpdateInfo) -> None:
        """Load the file. FileNotFoundError if there is none, ValueError if it and the engine's model don't fit."""
        path = Path(update_info.path)
        if not path.is_file():
            raise FileNotFoundError(f"weight file {path} is not there: expected one the learner has just written")
        # Before loading: a loaded layer is put back into its packed layout, whose parameters may have other names.
        expected_names = {name for name, _ in self.model.named_parameters()}
        reading = _Reading(path)
        try:
            loaded_names = self.model.load_weights(iter(reading))
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            reason = str(error) or "wrong shape"  # vLLM's loaders assert without a word
            raise ValueError(
                f"weight file {path.name}: {reading.current} does not fit the engine's model ({reason}); "
                f"expected the names and whole shapes of a checkpoint of {self.model_config.model}"
            ) from error
        missing_names = expected_names - self._optional_names() - loaded_names if loaded_names is not None else set()
        if missing_names and self.model_config.quantization is None:
            raise ValueError(
                f"weight file {path.name} has nothing for {', '.join(sorted(missing_names))}; "
                f"expected every parameter of {self.model_config.model}"
            )

    def finish_weight_update(self) -> None:
        """Pack what was loaded, in place, and put back what was not."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held between updates."""

    def _optional_names(self) -> set[str]:
        """What a checkpoint may leave out, as in vLLM's own check at start: a head that is tied to the embedding.

        During a reload the two are apart, so a file without it leaves the old head in place. Only the probe sees that.
        """
        return {"lm_head.weight"} if self.model_config.hf_text_config.tie_word_embeddings else set()

    def _drop_half_loaded_layers(self) -> None:
        """Forget what waits to be loaded; finishing then puts back these layers' old tensors, not half-filled ones."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        for module in self.model.modules():
            layer = get_layerwise_info(module)
            if layer.can_load():
                layer.loaded_weights.clear()
                layer.load_numel = 0


class _Reading:
    """A file's tensors one by one, and which one is being read. Mapped, not copied: workers share the pages."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.current = "the file"

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(self._path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                self.current = f"{name} {list(tensor.shape)}"
                yield name, tensor
