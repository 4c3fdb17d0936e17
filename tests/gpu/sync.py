"""Part (c): new weights from a learner in this process to an engine, through each backend; what the engine says before
and after, and how long it takes.

CUDA graphs are on: they must read the new weights too, so tokens are also written and their rows compared.
"""

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.sequence import Floats, TopLogprobs
from rollout_server.engines.protocol import ScoreRequest, WriteRequest
from tests.gpu.context import Context
from tests.gpu.models import MIDDLE, QWEN2_500M, Shape, random_text
from tests.gpu.readings import rows_at
from tests.gpu.records import Figures, NotRun
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


def _sync(context: Context, figures: Figures, backend: Any, *, engine_gpu: int = 0) -> None:
    pair = _pair(context, backend, engine_gpu)
    rounding = 1e-4 if pair.dtype == torch.float32 else 0.01  # nats that weights of another value may add
    at_start = _rms(_read(context, pair))
    sender = context.run(_open(pair, backend))
    try:
        _change(pair.model)
        unsent = _rms(_read(context, pair))
        seconds = []
        for version in range(1, NUM_SYNCS + 2):
            _change(pair.model)
            seconds.append(context.run(_send(sender, version)))
        read, written = _read(context, pair), _written(context, pair)
    finally:
        sender.shutdown()
    figures.add("rms before", at_start, "nats")
    # Unless new weights show, the probe would not see that they have not come.
    figures.add("rms with new weights not sent", unsent, "nats", at_least=5 * (at_start + rounding))
    figures.add("rms after, as read", _rms(read), "nats", at_most=2 * at_start + rounding)
    figures.add("rms after, as written", _rms(written), "nats", at_most=2 * at_start + rounding)
    figures.add("99% after, as read", float(np.quantile(np.abs(read), 0.99)), "nats")
    figures.add("largest after, as read", float(np.abs(read).max()), "nats")
    assert pair.engine.weight_version == NUM_SYNCS + 1, pair.engine.weight_version
    num_bytes = sum(tensor.numel() * pair.dtype.itemsize for tensor in named_weights(pair.model).values())
    figures.add("sent", num_bytes / 1e9, "GB")
    figures.add("first sync", seconds[0], "s")
    figures.add("later syncs", statistics.median(seconds[1:]), "s")
    figures.add("speed", num_bytes / 1e9 / statistics.median(seconds[1:]), "GB/s")


def _pair(context: Context, backend: str, engine_gpu: int) -> _Pair:
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


async def _open(pair: _Pair, backend: Any) -> WeightSender:
    """In a thread, as both ends wait for each other; the engine belongs to this loop."""
    loop = asyncio.get_running_loop()

    def on_loop(call: Any) -> None:
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
def _change(model: PreTrainedModel) -> None:
    """Every parameter gets another value, by a fifth of its spread."""
    for number, parameter in enumerate(model.parameters()):
        random = torch.Generator(device=parameter.device).manual_seed(number)
        noise = torch.randn(parameter.shape, generator=random, device=parameter.device)
        parameter += 0.2 * parameter.std(correction=0).clamp(min=0.01) * noise


def _read(context: Context, pair: _Pair) -> Floats:
    """Differences in nats, engine less learner, at the engine's ids of a few texts."""
    texts = [random_text(64, pair.shape.vocabulary, seed=600 + number) for number in range(NUM_TEXTS)]

    async def rows() -> list[TopLogprobs]:
        return await asyncio.gather(*(pair.engine.score(ScoreRequest(token_ids=text, start=1)) for text in texts))

    found = context.run(rows())
    return np.concatenate(
        [(row.logprobs - rows_at(_whole(pair, text), row)).ravel() for text, row in zip(texts, found, strict=True)]
    )


def _written(context: Context, pair: _Pair) -> Floats:
    """The same for tokens that the engine writes, each with its row."""
    requests = [
        WriteRequest(
            prefix=random_text(16, pair.shape.vocabulary, seed=700 + number),
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

    found = []
    for request, written in zip(requests, context.run(write()), strict=True):
        text = np.concatenate([request.prefix, written.token_ids])
        expected_nV = _whole(pair, text)[request.prefix.size - 1 : -1]
        found.append((written.top.logprobs - rows_at(expected_nV, written.top)).ravel())
    return np.concatenate(found)


@torch.inference_mode()
def _whole(pair: _Pair, text: Any) -> torch.Tensor:
    """[n, V] nats. In the engine's dtype where that is less than float32, as the learner's probe is."""
    device = pair.model.device
    ids_1n = torch.from_numpy(text).long()[None].to(device)
    with torch.autocast(device.type, pair.dtype, enabled=pair.dtype != torch.float32):
        logits_nV = pair.model(input_ids=ids_1n, use_cache=False).logits[0]
    return logits_nV.float().log_softmax(dim=-1)


def _rms(differences: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(differences.astype(np.float64)))))
