"""What the learner sends, the files it leaves, and the probe that tells when an engine did not take it. No engine."""

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.distributed.weight_transfer.base import ParamMeta, VLLMWeightSyncClient, WeightSource

from common.sequence import Floats, Ids, TopLogprobs
from common.weights import WeightUpdate
from trainer.probe import (
    EVERY_PARAMETER,
    WeightSyncError,
    check_sync,
    compare_probe,
    diagnose,
    parameter_group,
    read_probe,
)
from trainer.weight_files import WeightFolder, write_safetensors
from trainer.weight_sender import (
    HostMemoryTrainerEngine,
    HostMemoryTrainerInitInfo,
    LearnerWeights,
    OneCallClient,
    Rendezvous,
    WeightSender,
    build_sender,
    named_weights,
    replica_init_info,
)

VOCABULARY_SIZE = 64
TEXTS: list[Ids] = [np.array([1, 5, 9, 2, 33], np.int32), np.array([7, 7, 60], np.int32)]


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


def rows_of(model: LlamaForCausalLM, old_values: dict[str, Tensor] | None = None) -> list[TopLogprobs]:
    """What an engine with these weights would return, every token listed."""
    whole = [np.tile(np.arange(VOCABULARY_SIZE, dtype=np.int32), (text.size, 1)) for text in TEXTS]
    asked = [TopLogprobs(ids, np.zeros(ids.shape, np.float32)) for ids in whole]
    read = read_probe(model, TEXTS, asked, old_values)
    return [TopLogprobs(ids, logprobs) for ids, logprobs in zip(whole, read, strict=True)]


def trained(model: LlamaForCausalLM) -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    """The model with every weight moved, and its weights before."""
    before = {name: tensor.clone() for name, tensor in named_weights(model).items()}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model, before


def not_kept() -> None:
    """The weights before, of a sender that keeps none."""


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
    assert sender.current_update() is None
    sender.send(7)
    assert [update.version for update in engines.updates] == [7]
    assert sender.current_update() == engines.updates[-1]
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


def test_an_update_an_engine_refuses_does_not_count(tmp_path: Path) -> None:
    engines = Engines()
    sender = make_sender(make_model(), engines, tmp_path)
    sender.send(1)
    accepted = sender.current_update()
    engines.load = refuse  # type: ignore[method-assign]
    refusing = make_sender(make_model(), engines, tmp_path)
    with pytest.raises(ConnectionError):
        refusing.send(1)
    assert refusing.current_update() is None
    assert sender.current_update() == accepted


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
        build_sender("nccl", LearnerWeights(make_model(), dtype=torch.float32), Engines().client())


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


def test_each_replica_s_workers_get_ranks_of_their_own() -> None:
    init_info = {"master_address": "learner", "rank_offset": 1, "world_size": 5}
    offsets = [replica_init_info(init_info, replica=i, workers_per_replica=2)["rank_offset"] for i in (0, 1)]
    assert offsets == [1, 3]
    assert replica_init_info({"folder": "f"}, replica=1, workers_per_replica=2) == {"folder": "f"}


# ---------------------------------------------------------------------------------------------------------- the probe


def test_the_same_weights_give_no_difference() -> None:
    model = make_model()
    report = check_sync(model, not_kept, TEXTS, rows_of(model), tolerance=1e-6)
    assert report.max_difference == 0.0
    assert report.num_compared == sum(text.size for text in TEXTS) * VOCABULARY_SIZE


def test_the_learner_reads_a_row_for_the_token_that_follows_it() -> None:
    model = make_model()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(TEXTS[0])[None]).logits[0]
    assert np.allclose(rows_of(model)[0].logprobs, logits.log_softmax(-1).numpy(), atol=1e-6)


def test_the_report_says_where_the_largest_difference_is() -> None:
    ids = np.array([[3, 4], [5, 6]], np.int32)
    engine_rows = [TopLogprobs(ids, np.full((2, 2), -1.0, np.float32)) for _ in range(2)]
    learner: list[Floats] = [np.full((2, 2), -1.0, np.float32) for _ in range(2)]
    learner[0][0, 0] = -1.2
    learner[1][1, 0] = -1.5
    report = compare_probe(engine_rows, learner)
    assert (report.text_index, report.position, report.token_id) == (1, 2, 5)
    assert report.max_difference == pytest.approx(0.5)
    assert (report.engine_logprob, report.learner_logprob) == (-1.0, -1.5)


def test_a_row_the_engine_does_not_know_is_not_taken_for_equal() -> None:
    model = make_model()
    engine_rows = rows_of(model)
    engine_rows[1] = TopLogprobs.unknown(len(TEXTS[1]), VOCABULARY_SIZE)
    with pytest.raises(WeightSyncError, match="inf nats"):
        check_sync(model, not_kept, TEXTS, engine_rows, tolerance=1.0)


@pytest.mark.parametrize(
    "group", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1", "model.norm.weight"]
)
def test_the_group_that_kept_its_old_values_is_named(group: str) -> None:
    model, before = trained(make_model())
    old_values = {name: tensor for name, tensor in before.items() if parameter_group(name) == group}
    diagnosis = diagnose(model, before, TEXTS, rows_of(model, old_values))
    assert diagnosis.group == group
    assert diagnosis.max_difference < 1e-5
    with pytest.raises(WeightSyncError, match=f"student engine behaves as if {group} had kept its old values"):
        check_sync(model, lambda: before, TEXTS, rows_of(model, old_values), tolerance=1e-3)


def test_an_engine_that_took_nothing_is_told_from_one_that_left_out_a_part() -> None:
    model, before = trained(make_model())
    with pytest.raises(WeightSyncError, match=f"behaves as if {EVERY_PARAMETER} had kept its old values"):
        check_sync(model, lambda: before, TEXTS, rows_of(model, before), tolerance=1e-3)


def test_a_difference_that_no_old_values_explain_accuses_nobody() -> None:
    model, before = trained(make_model())
    with pytest.raises(WeightSyncError, match="no one parameter group's old values explain it"):
        check_sync(model, lambda: before, TEXTS, rows_of(make_model(seed=5)), tolerance=1e-3)


def test_looking_for_the_group_leaves_the_model_as_it_was() -> None:
    model, before = trained(make_model().train())
    now = {name: tensor.clone() for name, tensor in named_weights(model).items()}
    diagnose(model, before, TEXTS, rows_of(model))
    assert model.training
    assert all(torch.equal(tensor, now[name]) for name, tensor in named_weights(model).items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
