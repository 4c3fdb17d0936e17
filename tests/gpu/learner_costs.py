"""Part (a), what things cost: memory and time of the loss, of layers computed twice, of a whole step."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from common.config import CrossEntropy, Trainer
from common.sequence import MixedSequence
from tests.benchmarks.trainer_loss import Problem, chunked, make_inputs, plain
from tests.gpu.context import GIB, Context
from tests.gpu.machine import peak_tflops
from tests.gpu.models import QWEN2_500M, TINY, random_sequences
from tests.gpu.records import Figures, NotRun
from trainer.learner import Learner
from trainer.loss import Targets, distillation_losses

LOSS_MEMORY_BOUND = 0.25
"""Of the chunked loss over the plain one, in float32: what ``make bench-trainer`` asks of it on processors."""
_LARGE = Problem(vocabulary_size=151_936, num_positions=2048, hidden_size=896, k=64, positions_per_chunk=1024)
_SMALL = Problem(vocabulary_size=4096, num_positions=256, hidden_size=64, k=64, positions_per_chunk=64)
_PASSES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
    """Of one way to compute a loss and its gradients."""

    ms: float  # median over the passes
    gib: float | None  # peak above what was there before; None where it can't be told
    loss: float
    grad_norm: float  # of the output layer's weight


def loss_cost(context: Context, figures: Figures) -> None:
    """The bound is on memory; what time it takes depends on the card."""
    if context.is_cuda:
        context.needs_gib(10.0)
    problem = _LARGE if context.is_cuda else _SMALL
    hidden_NH, layer, targets = _inputs(problem, context.device)
    for dtype in (torch.float32, torch.bfloat16) if context.is_cuda else (torch.float32,):
        name = str(dtype).removeprefix("torch.")
        ours, theirs = (
            _cost(lambda loss=loss: loss(hidden_NH, layer, targets, problem), hidden_NH, layer, context, dtype)
            for loss in (chunked, plain)
        )
        is_exact = dtype == torch.float32
        apart = max(abs(ours.loss / theirs.loss - 1), abs(ours.grad_norm / theirs.grad_norm - 1))
        figures.add(f"{name}: loss and grad_norm, relative difference", apart, "", at_most=1e-4 if is_exact else 2e-2)
        _beside(figures, name, "plain", ours, theirs, memory_bound=LOSS_MEMORY_BOUND if is_exact else None)


def loss_beside_liger(context: Context, figures: Figures) -> None:
    """Liger's fused linear cross-entropy is the nearest it has to our loss on the tokens as written."""
    context.needs_cuda("Liger's kernels need a GPU")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise NotRun(f"liger-kernel is not installed ({error})") from error
    context.needs_gib(10.0)
    hidden_NH, layer, targets = _inputs(_LARGE, context.device)
    liger = LigerFusedLinearCrossEntropyLoss()
    chunk = _LARGE.positions_per_chunk

    def their_loss() -> Tensor:
        return liger(layer.weight, hidden_NH, targets.token_ids)

    def our_loss() -> Tensor:
        return distillation_losses(hidden_NH, layer, targets, CrossEntropy(), chunk).total

    ours = _cost(our_loss, hidden_NH, layer, context, torch.float32)
    theirs = _cost(their_loss, hidden_NH, layer, context, torch.float32)
    apart = max(abs(ours.loss / theirs.loss - 1), abs(ours.grad_norm / theirs.grad_norm - 1))
    figures.add("loss and grad_norm, relative difference", apart, "", at_most=1e-3)
    _beside(figures, "float32", "Liger's", ours, theirs)


def activation_memory(context: Context, figures: Figures) -> None:
    """Peak and time of a step of 4,096 tokens in bfloat16, with layers kept and with layers computed twice."""
    context.needs_gib(20.0)
    folder = context.model(QWEN2_500M, "bfloat16")
    sequences = random_sequences([(256, 768)] * 4, QWEN2_500M.vocabulary, k=64)
    for name, on in (("kept", False), ("computed twice", True)):
        config = Trainer(dtype="bfloat16", activation_checkpointing=on, tokens_per_micro_batch=4096)
        learner = Learner(str(folder), config, seed=0)
        learner.step(sequences)
        before_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        figures.add(f"{name}: step", _seconds_of_a_step(learner, sequences, context, num_steps=2), "s")
        figures.add(
            f"{name}: above the weights' memory", (torch.cuda.max_memory_allocated() - before_bytes) / GIB, "GiB"
        )
        del learner
        context.free_memory()


def throughput(context: Context, figures: Figures) -> None:
    """A step of texts of mixed lengths, as ``trainer.packing: auto`` has them, after two to warm up."""
    shape, config = TINY, Trainer(num_threads=1)
    lengths = [(16, 48), (24, 100)]
    if context.is_cuda:
        shape, config = QWEN2_500M, Trainer(dtype="bfloat16")
        lengths = [(128 + 32 * (number % 5), 256 + 96 * (number % 9)) for number in range(32)]
        context.needs_gib(14.0)
        is_small = torch.cuda.mem_get_info()[0] / GIB < 44.0
        tokens = 4096 if is_small else 8192
        config = config.model_copy(update={"activation_checkpointing": is_small, "tokens_per_micro_batch": tokens})
    learner = Learner(str(context.model(shape, config.dtype)), config, seed=0)
    sequences = random_sequences(lengths, shape.vocabulary, k=64)
    for _ in range(2 if context.is_cuda else 1):
        learner.step(sequences)
    if context.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds_of_a_step(learner, sequences, context, num_steps=3 if context.is_cuda else 1)
    totals = [sum(length) for length in lengths]
    flops = shape.step_flops(totals, sum(new for _, new in lengths))
    figures.add("speed, prompts included", sum(totals) / seconds, "tokens/s")
    figures.add("packed", float(learner.packed), "")
    figures.add("layers computed twice", float(config.activation_checkpointing), "")
    figures.add("model FLOP/s", flops / seconds / 1e12, "TFLOP/s")
    if context.is_cuda:
        figures.add("peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB")
        if (peak := peak_tflops(torch.cuda.get_device_name())) is not None:
            figures.add("model FLOP/s over the card's peak", flops / seconds / 1e12 / peak, "")


def _seconds_of_a_step(learner: Learner, sequences: list[MixedSequence], context: Context, *, num_steps: int) -> float:
    """Mean of a few in a row: the GPU may still be at one's optimizer when the next begins."""
    context.wait_for_device()
    started_s = time.perf_counter()
    for _ in range(num_steps):
        learner.step(sequences)
    context.wait_for_device()
    return (time.perf_counter() - started_s) / num_steps


def _inputs(problem: Problem, device: torch.device) -> tuple[Tensor, nn.Linear, Targets]:
    hidden_NH, layer, targets = make_inputs(problem)
    moved = replace(targets, **{name: getattr(targets, name).to(device) for name in Targets.__slots__})
    return hidden_NH.detach().to(device).requires_grad_(), layer.to(device), moved


def _cost(
    loss_of: Callable[[], Tensor], hidden_NH: Tensor, layer: nn.Linear, context: Context, dtype: torch.dtype
) -> _Cost:
    seconds, peak_bytes = [], None
    context.free_memory()
    for number in range(_PASSES + 2):
        hidden_NH.grad = layer.weight.grad = None
        context.wait_for_device()
        if context.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before_bytes = torch.cuda.memory_allocated()
        started_s = time.perf_counter()
        with torch.autocast(context.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of()
        loss.backward()
        context.wait_for_device()
        if context.is_cuda:
            peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
        if number >= 2:
            seconds.append(time.perf_counter() - started_s)
    assert layer.weight.grad is not None
    return _Cost(
        ms=1e3 * statistics.median(seconds),
        gib=None if peak_bytes is None else peak_bytes / GIB,
        loss=float(loss.detach()),
        grad_norm=float(layer.weight.grad.norm()),
    )


def _beside(
    figures: Figures, name: str, other: str, ours: _Cost, theirs: _Cost, *, memory_bound: float | None = None
) -> None:
    figures.add(f"{name}: chunked", ours.ms, "ms")
    figures.add(f"{name}: {other}", theirs.ms, "ms")
    figures.add(f"{name}: time over {other}", ours.ms / theirs.ms, "")
    if ours.gib is not None and theirs.gib is not None:
        figures.add(f"{name}: chunked, peak", ours.gib, "GiB")
        figures.add(f"{name}: {other}, peak", theirs.gib, "GiB")
        figures.add(f"{name}: memory over {other}", ours.gib / theirs.gib, "", at_most=memory_bound)
