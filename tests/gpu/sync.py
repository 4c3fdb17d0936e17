"""Part (c): new weights from a learner in this process to an engine, through each backend; what the run's own probe
says of it, and how long it takes.

CUDA graphs are on: they must read the new weights too, so tokens are also written and their rows compared.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.sequence import Ids, TopLogprobs
from common.weights import SyncBackend
from rollout_server.engines.protocol import ScoreRequest, WriteRequest
from tests.gpu.context import Context
from tests.gpu.models import MIDDLE, QWEN2_500M, Shape, random_text
from tests.gpu.records import Figures, NotRun
from trainer.probe import ProbeLimits, SyncProbe, WeightSyncError
from trainer.probe_reading import read
from trainer.probe_statistics import ProbeNoise, ProbeReport, compare_probe
from trainer.weight_sender import LearnerWeights, OneCallClient, Rendezvous, WeightSender, build_sender, named_weights

if TYPE_CHECKING:
    from rollout_server.engines.vllm import VLLMEngine

NUM_SYNCS = 5
TOP_LOGPROBS = 32
CALL_TIMEOUT_S = 120.0
NUM_TEXTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Learner's model and student engine of one check, which hold the same weights at first."""

    model: PreTrainedModel
    engine: "VLLMEngine"
    shape: Shape
    dtype: torch.dtype  # of the engine

    @property
    def texts(self) -> list[Ids]:
        return [random_text(64, self.shape.vocabulary, seed=600 + number) for number in range(NUM_TEXTS)]

    def limits(self, noise: ProbeNoise | None) -> ProbeLimits:
        """As a run has them."""
        return ProbeLimits.choose(tolerance=None, in_float32=self.dtype == torch.float32, noise=noise)


def host_memory(context: Context, figures: Figures) -> None:
    _sync(context, figures, "host_memory")


def ipc(context: Context, figures: Figures) -> None:
    context.needs_cuda("CUDA's inter-process memory needs a GPU")
    _sync(context, figures, "ipc")


def nccl(context: Context, figures: Figures) -> None:
    context.needs_cuda("NCCL needs two GPUs")
    if (num_gpus := torch.cuda.device_count()) < 2:
        raise NotRun(f"NCCL needs two GPUs, {num_gpus} is there")
    _sync(context, figures, "nccl", engine_gpu=1)


CHECKS: dict[str, Callable[[Context, Figures], None]] = {"host_memory": host_memory, "ipc": ipc, "nccl": nccl}


def _sync(context: Context, figures: Figures, backend: SyncBackend, *, engine_gpu: int = 0) -> None:
    """As a run does it: the probe's noise at the start, then a reading on both sides of each change and its sync."""
    pair = _pair(context, backend, engine_gpu)
    probe = SyncProbe(pair.model)
    noise = probe.measure_noise(pair.texts, [_rows(context, pair)], pair.limits(None))
    sender = context.run(_open(pair, backend))
    try:
        seconds, reports = [], []
        for version in range(1, NUM_SYNCS + 2):
            probe.read_before(pair.texts, [_rows(context, pair)])
            _change(pair.model, seed=version)
            seconds.append(context.run(_send(sender, version)))
            rows = [_rows(context, pair)]
            reports.append(probe.check(pair.texts, rows, pair.limits(noise), sender.previous_weights))
        written = _written(context, pair)
        _refuse_unsent(context, pair, probe, noise)
    finally:
        sender.shutdown()
    assert pair.engine.weight_version == NUM_SYNCS + 1, pair.engine.weight_version
    _add_differences(figures, noise, reports, written)
    num_bytes = sum(tensor.numel() * pair.dtype.itemsize for tensor in named_weights(pair.model).values())
    figures.add("sent", num_bytes / 1e9, "GB")
    figures.add("first sync", seconds[0], "s")
    figures.add("later syncs", statistics.median(seconds[1:]), "s")
    figures.add("speed", num_bytes / 1e9 / statistics.median(seconds[1:]), "GB/s")


def _add_differences(figures: Figures, noise: ProbeNoise, reports: list[ProbeReport], written: ProbeReport) -> None:
    """The probe has refused what is beyond its limits; the engine must also have made the learner's change."""
    figures.add("before: rms", noise.rms, "nats")
    figures.add("before: 99% within", noise.p99, "nats")
    figures.add("after: rms", max(report.rms for report in reports), "nats")
    figures.add("after: 99% within", max(report.p99 for report in reports), "nats")
    figures.add("after: largest", max(report.max_difference for report in reports), "nats")
    shares = [float("nan") if report.followed is None else report.followed for report in reports]
    figures.add("least share of the learner's change made by the engine", float(np.min(shares)), "", at_least=0.8)
    figures.add("largest share of it", float(np.max(shares)), "", at_most=1.2)
    # Decoding rounds otherwise than reading does, and the tokens are others.
    figures.add("after, rows of written tokens: rms", written.rms, "nats", at_most=max(1e-3, 3 * noise.rms))


def _refuse_unsent(context: Context, pair: _Pair, probe: SyncProbe, noise: ProbeNoise) -> None:
    """The probe must see that new weights have not come, or what it said before says nothing."""
    rows = [_rows(context, pair)]
    probe.read_before(pair.texts, rows)
    _change(pair.model, seed=0)
    try:
        probe.check(pair.texts, rows, pair.limits(noise))
    except WeightSyncError as refusal:
        print(f"as it should be, the probe refused weights that were not sent: {refusal}", flush=True)
        return
    raise AssertionError("the probe did not notice weights that were not sent")


def _pair(context: Context, backend: SyncBackend, engine_gpu: int) -> _Pair:
    shape, dtype = (QWEN2_500M, torch.bfloat16) if context.is_cuda else (MIDDLE, torch.float32)
    if context.is_cuda:
        context.needs_gib(12.0)
    name = "float32" if dtype == torch.float32 else "bfloat16"
    folder = context.model(shape, name)
    engine = context.engine(
        folder,
        top_logprobs=TOP_LOGPROBS,
        backend=backend,
        gpu=engine_gpu,
        dtype=name,
        enforce_eager=not context.is_cuda,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(context.device).eval()
    return _Pair(model=model, engine=engine, shape=shape, dtype=dtype)


async def _open(pair: _Pair, backend: SyncBackend) -> WeightSender:
    """In a thread, as both ends wait for each other; the engine belongs to this loop."""
    loop = asyncio.get_running_loop()

    def on_loop(call: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(call, loop).result(CALL_TIMEOUT_S)

    client = OneCallClient(
        init=lambda transfer_info: on_loop(pair.engine.init_weight_transfer(transfer_info)),
        load=lambda update: on_loop(pair.engine.load_weights(update)),
    )
    rendezvous = Rendezvous.on_this_machine(num_workers=1) if backend == "nccl" else None
    source = LearnerWeights(pair.model, dtype=pair.dtype)
    return await asyncio.to_thread(build_sender, backend, source, client, rendezvous=rendezvous)


async def _send(sender: WeightSender, version: int) -> float:
    """Seconds until the engine holds them."""
    started_s = time.perf_counter()
    await asyncio.to_thread(sender.send, version)
    return time.perf_counter() - started_s


@torch.no_grad()
def _change(model: PreTrainedModel, *, seed: int) -> None:
    """Every parameter moves by a twentieth of its spread: more than bfloat16 rounds away."""
    random = torch.Generator(device=model.device).manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random, device=parameter.device)
        parameter += 0.05 * parameter.std(correction=0).clamp(min=0.01) * noise


def _rows(context: Context, pair: _Pair) -> list[TopLogprobs]:
    """The engine's, of the probe's texts."""

    async def score() -> list[TopLogprobs]:
        return await asyncio.gather(*(pair.engine.score(ScoreRequest(token_ids=it, start=1)) for it in pair.texts))

    return context.run(score())


def _written(context: Context, pair: _Pair) -> ProbeReport:
    """The same comparison for tokens that the engine writes, each with its row."""
    num_prompt = 16
    requests = [
        WriteRequest(
            prefix=random_text(num_prompt, pair.shape.vocabulary, seed=700 + number),
            max_tokens=32,
            temperature=0.0,
            top_p=1.0,
            seed=0,
            chunk_tokens=32,
            ignore_eos=True,
        )
        for number in range(NUM_TEXTS)
    ]

    async def write() -> list[Any]:
        return await asyncio.gather(*(pair.engine.generate(request) for request in requests))

    pieces = context.run(write())
    texts = [
        np.concatenate([request.prefix, piece.token_ids[:-1]]) for request, piece in zip(requests, pieces, strict=True)
    ]
    # Asked for at every position of a text; only those from the prompt's last on are the written tokens'.
    ids = [np.concatenate([np.zeros((num_prompt - 1, TOP_LOGPROBS), np.int32), it.top.token_ids]) for it in pieces]
    learner = [logprobs[num_prompt - 1 :] for logprobs in read(pair.model, texts, ids).logprobs]
    return compare_probe([piece.top for piece in pieces], learner)
