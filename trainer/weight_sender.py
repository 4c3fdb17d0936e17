"""The learner's half of the weight transfer: tensors to send, backends, and the client that calls the engines.

Everything goes through vLLM's own trainer-side interface. ``nccl`` and ``ipc`` are vLLM's code; ``host_memory``, which
needs no GPU, is implemented here. Does not depend on Ray: whoever builds the client decides how to call engines.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    materialize_full_tensor,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.utils.network_utils import get_ip, get_open_port

from common.errors import UserError
from common.ipc_handles import plain_handles
from common.weights import NCCL_BUFFER_BYTES, NCCL_NUM_BUFFERS, SyncBackend, WeightUpdate, WeightVersion
from trainer.lora import adapted_layers, checkpoint_names, merged_weight
from trainer.weight_files import SAFETENSORS_DTYPES, WeightFolder, write_safetensors

HOST_MEMORY = "host_memory"
SHARED_MEMORY = Path("/dev/shm")


# ------------------------------------------------------------------------------------------------ the tensors to send


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every floating-point tensor of a checkpoint under its Hugging Face name; tied tensors once under each name.

    An engine keeps a tied output head separate while it loads (and packs it separately for good on CPUs), so
    ``lm_head.weight`` must be sent as well as ``model.embed_tokens.weight``; ``named_parameters()`` leaves it out.
    Models whose parameter names in transformers differ from the checkpoint (fused experts) are not supported.
    """
    weights = checkpoint_names(model, model.state_dict())
    return {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}


class LearnerWeights(WeightSource):  # type: ignore[misc]
    """The model's weights at the time of iteration: unsharded tensors in the engine's dtype, adapters merged in.

    Under FSDP iterating is a collective, so every rank does it, in the same order."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype) -> None:
        if dtype not in SAFETENSORS_DTYPES:
            raise ValueError(f"engine dtype must be one of {', '.join(map(str, SAFETENSORS_DTYPES))}, got {dtype}")
        self._model = model
        self._dtype = dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self._model.parameters()).device

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(name, self._dtype, tuple(tensor.shape)) for name, tensor in named_weights(self._model).items()
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        adapted = adapted_layers(self._model)
        for name, weight in named_weights(self._model).items():
            tensor = merged_weight(adapted[name]) if name in adapted else weight
            yield name, materialize_full_tensor(tensor.detach().to(self._dtype))


# ----------------------------------------------------------------------------------------------- calls to the engines


class OneCallClient:
    """vLLM's client protocol (``VLLMWeightSyncClient``), with a whole update in one call to the engine.

    In vLLM's protocol, an update is three calls (start, update, finish). Between them an engine is paused and without
    parameters, and stays so if the learner dies. Here the engine gets one ``WeightUpdate`` and pauses, loads and
    resumes by itself, so it resumes whatever happens to the learner.

    ``init(transfer_info)`` and ``load(update)`` call every engine and return when all are done, or raise.
    """

    def __init__(self, *, init: Callable[[Mapping[str, object]], None], load: Callable[[WeightUpdate], None]) -> None:
        self._init = init
        self._load = load
        self.version: WeightVersion = 0  # of the update in progress; vLLM's protocol does not pass it

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._init(init_info)

    def start_weight_update(self) -> None:
        """Nothing to do: the engine starts the update when it gets it."""

    def update_weights(self, update_info: Any) -> None:
        self._load(WeightUpdate(version=self.version, transfer_info=plain_handles(update_info)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing to do: the engine finished before ``update_weights`` returned, with the update's version."""


def replica_init_info(init_info: Mapping[str, object], *, replica: int, workers_per_replica: int) -> dict[str, object]:
    """The init info for one of several engines: each worker has a rank of its own in an NCCL group.

    vLLM numbers only the workers of one engine, so ``init`` must pass this to replica 0, 1, ...
    """
    shifted = dict(init_info)
    if isinstance(rank_offset := shifted.get("rank_offset"), int):
        shifted["rank_offset"] = rank_offset + replica * workers_per_replica
    return shifted


# ------------------------------------------------------------------------------------------------------------- sending


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """The address at which the learner's first rank and all engine workers form the NCCL group."""

    master_address: str  # of the learner's first rank, reachable from the engines' machines
    master_port: int
    world_size: int  # 1 + engine workers, all replicas together

    @classmethod
    def on_this_machine(cls, *, num_workers: int) -> Self:
        """A free port of this learner rank's machine, for this number of engine workers."""
        return cls(master_address=get_ip(), master_port=get_open_port(), world_size=1 + num_workers)


class WeightSender:
    """The weight transfer of one learner rank. Every rank calls every method; only rank 0 calls the engines."""

    def __init__(
        self,
        engine: TrainerWeightTransferEngine,
        client: OneCallClient,
        *,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        """``synchronize`` returns when the device has finished all queued work."""
        self._engine = engine
        self._client = client
        self._synchronize = synchronize

    def send(self, version: WeightVersion) -> None:
        """Send the source's present weights as this version. Returns when every engine holds them."""
        self._client.version = version
        # vLLM's senders read the weights on their own streams, which don't wait for the optimizer's.
        self._synchronize()
        self._engine.send_weights()

    def previous_weights(self) -> dict[str, Tensor] | None:
        """The engines' weights before the last send, for the diagnosis. None without a copy (ipc, nccl, ranks above
        0).
        """
        return self._engine.previous_weights() if isinstance(self._engine, HostMemoryTrainerEngine) else None

    def shutdown(self) -> None:
        self._engine.shutdown()


def build_sender(
    backend: SyncBackend,
    source: LearnerWeights,
    client: OneCallClient,
    *,
    rank: int = 0,
    rendezvous: Rendezvous | None = None,
) -> WeightSender:
    """Open the transfer. Called on every learner rank once the engines are up; blocks until the engines have joined.

    ``source`` must still hold the weights that the engines loaded at start. ``ipc`` and ``nccl`` are vLLM's own
    backends and need GPUs on both sides: ``ipc`` the same GPU, ``nccl`` different GPUs and a rendezvous.
    """
    init_info = _init_info(backend, rank, rendezvous, source.device)
    engine = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)
    return WeightSender(engine, client, synchronize=partial(wait_for_device, source.device))


def _init_info(backend: SyncBackend, rank: int, rendezvous: Rendezvous | None, device: torch.device) -> TrainerInitInfo:
    """The init info for vLLM's trainer side. Raises UserError if a backend needs a GPU and the learner is on the
    CPU.
    """
    if backend != "host_memory" and rank == 0 and device.type == "cpu":
        raise UserError(f"sync.backend is {backend}, which needs the learner on a GPU, but it is on the CPU")
    match backend:
        case "host_memory":
            return HostMemoryTrainerInitInfo(rank=rank)
        case "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            # Packed transfers reuse one buffer in many calls, but here an update is one call.
            return IPCTrainerInitInfo(rank=rank, packed=False)
        case "nccl":
            if rendezvous is None:
                raise ValueError("sync.backend = nccl needs a rendezvous (address, port, world size), got none")
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            return NCCLTrainerInitInfo(
                rank=rank,
                master_address=rendezvous.master_address,
                master_port=rendezvous.master_port,
                world_size=rendezvous.world_size,
                packed_buffer_size_bytes=NCCL_BUFFER_BYTES,
                packed_num_buffers=NCCL_NUM_BUFFERS,
            )


def wait_for_device(device: torch.device) -> None:
    """Return when every stream of the device has finished all queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# --------------------------------------------------------------------------------------------- through host memory


@dataclass
class HostMemoryTrainerInitInfo(TrainerInitInfo):  # type: ignore[misc]
    backend: ClassVar[str] = HOST_MEMORY

    parent: Path = SHARED_MEMORY
    """Where the folder is made: in memory that all processes of this machine share."""


class HostMemoryTrainerEngine(TrainerWeightTransferEngine[HostMemoryTrainerInitInfo]):  # type: ignore[misc]
    """Writes one safetensors file per send into its own folder and keeps the last two; writes the first at the
    start."""

    init_info_cls = HostMemoryTrainerInitInfo

    def __init__(
        self,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource,
        is_sender: bool = True,
        parent: Path = SHARED_MEMORY,
    ) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self._folder = WeightFolder(parent) if is_sender else None
        self._num_written = 0
        self._previous: Path | None = None
        self._current = self._write()

    @classmethod
    def trainer_init(
        cls,
        init_info: HostMemoryTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        if source is None:
            raise ValueError("host_memory weight transfer needs a WeightSource, got none")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender, parent=init_info.parent)
        if engine._folder is not None:
            client.init_weight_transfer_engine({"folder": str(engine._folder.path)})
        return engine

    def send_weights(self) -> None:
        if self._previous is not None:
            self._previous.unlink()  # before writing, so that at most two files are in memory
            self._previous = None
        new = self._write()
        if new is not None:
            self.client.start_weight_update()
            self.client.update_weights({"path": str(new)})
            self.client.finish_weight_update()
        self._previous, self._current = self._current, new

    def previous_weights(self) -> dict[str, Tensor] | None:
        return None if self._previous is None else load_file(self._previous)

    def shutdown(self) -> None:
        if self._folder is not None:
            self._folder.remove()

    def _write(self) -> Path | None:
        """Write a new file on the sender. Other ranks only take part in gathering."""
        if self._folder is None:
            for _ in self.source:
                pass
            return None
        path = self._folder.path / f"weights-{self._num_written:06d}.safetensors"
        self._num_written += 1
        write_safetensors(path, self.source)
        return path


with suppress(ValueError):  # raised if the name is registered: this module was loaded before
    WeightTransferTrainerFactory.register_engine(HOST_MEMORY, __name__, "HostMemoryTrainerEngine")
