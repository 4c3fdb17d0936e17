"""What the learner sends, in which order, and the files it leaves. No engine."""

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.storage import TypedStorage
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES, pack_tensors
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from common.errors import UserError
from common.ipc_handles import plain_handles
from common.weights import NCCL_BUFFER_BYTES, NCCL_NUM_BUFFERS, SyncBackend, WeightUpdate, nccl_buffer_bytes
from rollout_server.engines.vllm_plugin.ipc import PlainIpcWeightTransferEngine
from rollout_server.engines.vllm_plugin.weight_transfer import engine_backend, register
from trainer.weight_files import WeightFolder, write_safetensors
from trainer.weight_sender import (
    HostMemoryTrainerEngine,
    HostMemoryTrainerInitInfo,
    LearnerWeights,
    OneCallClient,
    Rendezvous,
    WeightSender,
    _init_info,
    build_sender,
    named_weights,
    replica_init_info,
)

VOCABULARY_SIZE = 64


def make_model(*, seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def trained(model: LlamaForCausalLM) -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    """The model with every weight moved, and its weights before."""
    before = {name: tensor.clone() for name, tensor in named_weights(model).items()}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model, before


class Engines:
    """Stands where the engines are: remembers what reached it, and what was in the file when it did."""

    def __init__(self) -> None:
        self.opened: list[dict[str, object]] = []
        self.updates: list[WeightUpdate] = []
        self.weights: list[dict[str, Tensor]] = []

    def load(self, update: WeightUpdate) -> None:
        self.updates.append(update)
        self.weights.append(load_file(str(update.transfer_info["path"])))

    def client(self) -> OneCallClient:
        return OneCallClient(init=lambda transfer_info: self.opened.append(dict(transfer_info)), load=self.load)


def make_sender(model: LlamaForCausalLM, engines: Engines, parent: Path) -> WeightSender:
    client = engines.client()
    engine = HostMemoryTrainerEngine.trainer_init(
        HostMemoryTrainerInitInfo(rank=0, parent=parent),
        client=client,
        source=LearnerWeights(model, dtype=torch.float32),
    )
    return WeightSender(engine, client)


# ------------------------------------------------------------------------------------------------------ what is sent


def test_a_tied_head_is_sent_beside_its_embedding() -> None:
    model = make_model(tied=True)
    assert "lm_head.weight" not in dict(model.named_parameters())
    sent = dict(LearnerWeights(model, dtype=torch.float32))
    assert torch.equal(sent["lm_head.weight"], sent["model.embed_tokens.weight"])
    assert sent.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()


def test_metadata_says_what_iterating_yields() -> None:
    source = LearnerWeights(make_model(), dtype=torch.bfloat16)
    yielded = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
    assert source.metadata() == yielded
    assert {tensor.dtype for tensor in yielded} == {torch.bfloat16}


def test_a_dtype_that_no_engine_computes_in_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine dtype must be one of .*float32.*, got torch\.int8"):
        LearnerWeights(make_model(), dtype=torch.int8)


# --------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_written_file_reads_back_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    source = LearnerWeights(make_model(), dtype=dtype)
    write_safetensors(tmp_path / "weights.safetensors", source)
    read = load_file(tmp_path / "weights.safetensors")
    expected = dict(source)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


class BreaksHalfWay(WeightSource):
    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta("a", torch.float32, (2,)), ParamMeta("b", torch.float32, (2,))]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(2)
        raise RuntimeError("the learner died")


def test_a_learner_that_dies_while_writing_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the learner died"):
        write_safetensors(tmp_path / "weights.safetensors", BreaksHalfWay())
    assert list(tmp_path.iterdir()) == []


class TooLarge(BreaksHalfWay):
    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta("a", torch.float32, (2**50,))]


def test_missing_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"MiB free, the weights need \d+ MiB: give the container") as no_room:
        write_safetensors(tmp_path / "weights.safetensors", TooLarge())
    assert no_room.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_the_last_two_versions_are_kept(tmp_path: Path) -> None:
    sender = make_sender(make_model(), Engines(), tmp_path)
    num_files = []
    for version in (1, 2, 3):
        sender.send(version)
        num_files.append(len(list(tmp_path.glob("*/*.safetensors"))))
    assert num_files == [2, 2, 2]  # from the first send on: the weights at start are version 0
    sender.shutdown()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_learner_left_is_removed_and_a_living_one_s_is_not(tmp_path: Path) -> None:
    living = WeightFolder(tmp_path)
    program = f"""
import os, signal
from pathlib import Path
from trainer.weight_files import WeightFolder
folder = WeightFolder(Path({str(tmp_path)!r}))
print(folder.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left_behind = Path(killed.stdout.split()[-1])
    assert left_behind.is_dir()
    assert living.path.is_dir()
    new = WeightFolder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([living.path, new.path])


# --------------------------------------------------------------------------------------------------------- the client


def test_one_update_reaches_an_engine_as_one_call(tmp_path: Path) -> None:
    model, engines = make_model(), Engines()
    sender = make_sender(model, engines, tmp_path)
    assert engines.opened == [{"folder": str(next(tmp_path.iterdir()))}]
    sender.send(7)
    assert [update.version for update in engines.updates] == [7]
    assert torch.equal(engines.weights[0]["lm_head.weight"], model.lm_head.weight)


def test_the_weights_before_the_last_send_can_be_had(tmp_path: Path) -> None:
    model = make_model()
    sender = make_sender(model, Engines(), tmp_path)
    assert sender.previous_weights() is None
    model, before = trained(model)
    sender.send(1)
    previous = sender.previous_weights()
    assert previous is not None
    assert all(torch.equal(previous[name], before[name]) for name in before)


def test_an_update_an_engine_refuses_is_an_error(tmp_path: Path) -> None:
    engines = Engines()
    engines.load = refuse  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        make_sender(make_model(), engines, tmp_path).send(1)


def refuse(update: WeightUpdate) -> None:
    raise ConnectionError(f"engine is gone at version {update.version}")


def test_other_ranks_gather_but_neither_write_nor_call(tmp_path: Path) -> None:
    engines = Engines()
    gathered: list[str] = []

    class Gathering(LearnerWeights):
        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in super().__iter__():
                gathered.append(name)
                yield name, tensor

    model, client = make_model(), engines.client()
    engine = HostMemoryTrainerEngine.trainer_init(
        HostMemoryTrainerInitInfo(rank=1, parent=tmp_path),
        client=client,
        source=Gathering(model, dtype=torch.float32),
    )
    WeightSender(engine, client).send(1)
    assert gathered == 2 * list(named_weights(model))
    assert (engines.opened, engines.updates, list(tmp_path.iterdir())) == ([], [], [])


def test_the_client_is_what_vllm_asks_for() -> None:
    assert isinstance(Engines().client(), VLLMWeightSyncClient)


def test_host_memory_goes_through_vllm_s_factory() -> None:
    engines = Engines()
    sender = build_sender("host_memory", LearnerWeights(make_model(), dtype=torch.float32), engines.client())
    folder = Path(str(engines.opened[0]["folder"]))
    sender.send(1)
    assert folder.is_dir()
    sender.shutdown()
    assert not folder.exists()


def test_nccl_without_a_rendezvous_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sync\.backend = nccl needs a rendezvous"):
        build_sender("nccl", LearnerWeights(make_model(), dtype=torch.float32), Engines().client(), rank=1)


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
def test_what_goes_from_gpu_to_gpu_is_refused_on_the_cpu(backend: SyncBackend) -> None:
    with pytest.raises(UserError, match=rf"^sync\.backend is {backend}, which needs the learner on a GPU"):
        build_sender(backend, LearnerWeights(make_model(), dtype=torch.float32), Engines().client())


def test_nccl_goes_through_vllm_s_factory_and_other_ranks_only_gather() -> None:
    """Rank 0 needs a GPU, so this is all of the branch that can run without one."""
    engines = Engines()
    rendezvous = Rendezvous.on_this_machine(num_workers=2)
    assert rendezvous.world_size == 3
    source = LearnerWeights(make_model(), dtype=torch.float32)
    sender = build_sender("nccl", source, engines.client(), rank=1, rendezvous=rendezvous)
    sender.send(1)
    assert (engines.opened, engines.updates) == ([], [])
    assert sender.previous_weights() is None
    sender.shutdown()


def test_nccl_s_buffers_fit_beside_an_engine_as_vllm_s_own_do_not() -> None:
    sender = build_sender(
        "nccl",
        LearnerWeights(make_model(), dtype=torch.float32),
        Engines().client(),
        rank=1,
        rendezvous=Rendezvous.on_this_machine(num_workers=1),
    )
    engine = sender._engine
    assert (engine.packed, engine.packed_buffer_size_bytes) == (True, NCCL_BUFFER_BYTES)
    assert engine.packed_num_buffers == NCCL_NUM_BUFFERS
    assert nccl_buffer_bytes(largest_tensor_bytes=0) < 2**28 < DEFAULT_PACKED_BUFFER_SIZE_BYTES


@pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes:UserWarning")
def test_no_more_than_is_said_lies_in_nccl_s_buffers() -> None:
    """vLLM's packing, tensor by tensor; what lies in buffers is counted as its sender and its receiver hold it."""
    largest = 90 << 20
    sizes = [largest, largest, *[8 << 20] * 30, 40 << 20, *[24 << 20] * 6, largest]
    tensors = iter([(str(number), torch.empty(size, dtype=torch.uint8)) for number, size in enumerate(sizes)])
    slots = [0] * NCCL_NUM_BUFFERS
    num_chunks = most_sending = most_receiving = 0
    while (chunk := pack_tensors(tensors, lambda item: item[1], NCCL_BUFFER_BYTES)) is not None:
        num_bytes, slot = chunk.packed_tensor.numel(), num_chunks % NCCL_NUM_BUFFERS
        most_receiving = max(most_receiving, sum(slots) + num_bytes)  # the slot's old buffer goes last
        most_sending = max(most_sending, sum(slots) - slots[slot] + 2 * num_bytes)  # as they were, and packed
        slots[slot] = num_bytes
        num_chunks += 1
    assert num_chunks > 2 * NCCL_NUM_BUFFERS
    assert max(most_sending, most_receiving) <= nccl_buffer_bytes(largest_tensor_bytes=largest)


def test_the_device_has_done_all_it_was_given_before_a_sender_reads_the_weights() -> None:
    order: list[str] = []

    class Recording(TrainerWeightTransferEngine[TrainerInitInfo]):  # type: ignore[misc]
        @classmethod
        def trainer_init(cls, init_info: TrainerInitInfo, **rest: object) -> "Recording":
            return cls(client=Engines().client())

        def send_weights(self) -> None:
            order.append("send")

    client = Engines().client()
    sender = WeightSender(Recording(client=client), client, synchronize=lambda: order.append("wait"))
    sender.send(1)
    sender.send(2)
    assert order == ["wait", "send", "wait", "send"]


def test_each_replica_s_workers_get_ranks_of_their_own() -> None:
    init_info = {"master_address": "learner", "rank_offset": 1, "world_size": 5}
    offsets = [replica_init_info(init_info, replica=i, workers_per_replica=2)["rank_offset"] for i in (0, 1)]
    assert offsets == [1, 3]
    assert replica_init_info({"folder": "f"}, replica=1, workers_per_replica=2) == {"folder": "f"}


# ------------------------------------------------------------------------------------------------------------------ ipc


def handle_of(tensor: Tensor) -> tuple[object, ...]:
    """As ``reduce_tensor`` describes a tensor that lies on a GPU."""
    storage = (b"handle", tensor.untyped_storage().nbytes(), 0)
    sharing = (tensor.requires_grad, b"counter", 3, b"event", True)
    return (Tensor, tensor.size(), tensor.stride(), 0, TypedStorage, tensor.dtype, 0, *storage, *sharing)


class IpcOnTheCpu(IPCTrainerWeightTransferEngine):  # type: ignore[misc]
    """vLLM's sender, where there is no GPU to ask: only what it asks of one is made up."""

    def __init__(self, client: OneCallClient, source: WeightSource) -> None:
        TrainerWeightTransferEngine.__init__(self, client=client, source=source)
        self.packed = False
        self.gpu_uuid = "GPU-1"

    def _all_gather_and_merge_handles(self, handles: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert len(handles) == len(self.source.metadata())
        return [{self.gpu_uuid: handle_of(tensor)} for _, tensor in self.source]

    @staticmethod
    def _post_send_sync() -> None: ...


def test_an_ipc_update_is_one_call_that_vllm_carries_without_pickling() -> None:
    model, updates = make_model(), []
    client = OneCallClient(init=lambda _: None, load=updates.append)
    source = LearnerWeights(model, dtype=torch.bfloat16)
    WeightSender(IpcOnTheCpu(client, source), client).send(4)
    (update,) = updates
    assert update.version == 4
    carried = MsgpackDecoder(dict).decode(MsgpackEncoder().encode(dict(update.transfer_info)))
    received = EngineHalf().parse_update_info(carried)
    assert received.names == [meta.name for meta in source.metadata()]
    assert received.ipc_handles == [{"GPU-1": handle_of(tensor)} for _, tensor in source]


class EngineHalf(PlainIpcWeightTransferEngine):  # type: ignore[misc]
    """Without an engine."""

    def __init__(self) -> None: ...


def test_a_handle_of_another_kind_of_tensor_is_not_carried() -> None:
    arguments = (nn.Parameter, *handle_of(torch.zeros(2))[1:])
    with pytest.raises(TypeError, match="an IPC handle's tensor_cls must be Tensor"):
        plain_handles({"ipc_handles": [{"GPU-1": arguments}]})


def test_an_update_without_handles_is_carried_as_it_is() -> None:
    assert plain_handles({"path": "weights"}) == {"path": "weights"}


def test_ipc_is_not_packed_and_vllm_s_half_is_registered_under_our_name() -> None:
    init_info = _init_info("ipc", 1, None, torch.device("cpu"))
    assert (init_info.backend, init_info.packed) == ("ipc", False)
    register()
    assert engine_backend("ipc") in WeightTransferEngineFactory._registry
    assert WeightTransferEngineFactory._registry[engine_backend("ipc")]() is PlainIpcWeightTransferEngine
