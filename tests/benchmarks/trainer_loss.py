"""Time and memory of the chunked loss against the same loss on all positions at once, left to autograd.

    python -m tests.benchmarks.trainer_loss

Prints JSON. Each variant runs forward and backward in a process of its own, one torch thread. Its peak memory is what
the process's resident set grew by (ru_maxrss): logits, gradients and all that is kept in between, but not the weight,
the hidden states and the targets, which were there before. Its time is processor time, so that a busy machine does not
count; the fastest pass. Processor only: what a GPU would need is not measured here.

At the default sizes the plain variant takes about 5 GiB, and each pass 10 to 20 seconds of processor time.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.config import ForwardKL, Trainer
from common.divergence import divergence
from tests.benchmarks.trainer_report import Figure, machine
from trainer.loss import Targets, distillation_losses, teacher_buckets

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Sizes. The student is one output layer on random hidden states."""

    vocabulary_size: int
    num_positions: int
    hidden_size: int
    k: int
    positions_per_chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Passes forward and backward in a process of its own."""

    seconds: float  # of processor time, the fastest pass
    peak_bytes: int  # above what was there before the first pass
    loss: float  # nats, mean
    grad_norm: float  # of the output layer's weight


def make_inputs(problem: Problem) -> tuple[Tensor, nn.Linear, Targets]:
    """The same for every variant. The teacher's list holds 0.9 of its mass."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(problem.num_positions, problem.hidden_size, generator=generator).requires_grad_()
    layer = nn.Linear(problem.hidden_size, problem.vocabulary_size, bias=False)
    layer.weight.data.normal_(std=problem.hidden_size**-0.5, generator=generator)
    shape = (problem.num_positions, problem.k)
    stride = problem.vocabulary_size // problem.k
    ids_Nk = torch.randint(stride, shape, generator=generator) + stride * torch.arange(problem.k)  # no id twice
    logprobs_Nk = torch.randn(shape, generator=generator).log_softmax(dim=-1) + torch.tensor(0.9).log()
    weights_N = torch.full((problem.num_positions,), 1.0 / problem.num_positions)
    return hidden_NH, layer, Targets(
        token_ids=ids_Nk[:, 0], teacher_ids=ids_Nk, teacher_logprobs=logprobs_Nk, weights=weights_N
    )  # fmt: skip


def chunked(hidden_NH: Tensor, layer: nn.Linear, targets: Targets, problem: Problem) -> Tensor:
    return distillation_losses(hidden_NH, layer, targets, ForwardKL(), problem.positions_per_chunk).total


def plain(hidden_NH: Tensor, layer: nn.Linear, targets: Targets, problem: Problem) -> Tensor:
    """The same buckets, with the logits of all positions: gather the listed ids, logsumexp over the others."""
    logits_NV = layer(hidden_NH)
    log_rest_N1 = logits_NV.scatter(1, targets.teacher_ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    log_q_NM = torch.cat([logits_NV.gather(1, targets.teacher_ids), log_rest_N1], dim=-1).log_softmax(dim=-1)
    log_p_NM = teacher_buckets(targets.teacher_ids, targets.teacher_logprobs, problem.vocabulary_size)
    return (targets.weights * divergence(log_p_NM, log_q_NM, ForwardKL())).sum()


VARIANTS = {"chunked": chunked, "plain": plain}


def measure(variant: str, problem: Problem, num_passes: int) -> Measurement:
    """Runs in a fresh process: ru_maxrss never falls."""
    torch.set_num_threads(1)
    hidden_NH, layer, targets = make_inputs(problem)
    torch.mm(hidden_NH[:8], hidden_NH[:8].T)  # loads the matrix library
    before_bytes, seconds = _max_rss_bytes(), []
    for _ in range(num_passes):
        hidden_NH.grad = layer.weight.grad = None
        started_s = time.process_time()
        loss = VARIANTS[variant](hidden_NH, layer, targets, problem)
        loss.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.process_time() - started_s)
    assert layer.weight.grad is not None
    return Measurement(
        seconds=min(seconds),
        peak_bytes=_max_rss_bytes() - before_bytes,
        loss=loss.item(),
        grad_norm=float(layer.weight.grad.norm()),
    )


def run(problem: Problem, *, num_passes: int, repetitions: int) -> dict[str, Any]:
    """All variants in turn, ``repetitions`` times over, so that a busy spell of the machine hits both."""
    spawn = multiprocessing.get_context("spawn")
    measured: dict[str, list[Measurement]] = {variant: [] for variant in VARIANTS}
    for _ in range(repetitions):
        for variant, measurements in measured.items():
            with spawn.Pool(1) as pool:
                measurements.append(pool.apply(measure, (variant, problem, num_passes)))
    seconds = {variant: min(m.seconds for m in measurements) for variant, measurements in measured.items()}
    peak_bytes = {
        variant: statistics.median(m.peak_bytes for m in measurements) for variant, measurements in measured.items()
    }
    return {
        "chunked_memory_ratio": round(peak_bytes["chunked"] / peak_bytes["plain"], 3),
        "chunked_time_ratio": round(seconds["chunked"] / seconds["plain"], 3),
        "processor_seconds": {variant: [round(m.seconds, 2) for m in ms] for variant, ms in measured.items()},
        "peak_gib": {variant: round(value / GIB, 3) for variant, value in peak_bytes.items()},
        "loss_nats": {variant: ms[0].loss for variant, ms in measured.items()},
        "grad_norm": {variant: ms[0].grad_norm for variant, ms in measured.items()},
        **asdict(problem),
        "loss": "forward_kl",
        "dtype": "float32",
        "num_threads": 1,
        **machine("torch"),
    }


def measure_figures(*, repetitions: int) -> dict[str, Figure]:
    """At the sizes of a large vocabulary, for trainer.json."""
    problem = Problem(
        vocabulary_size=151_936,
        num_positions=2048,
        hidden_size=896,
        k=64,
        positions_per_chunk=Trainer().positions_per_chunk,
    )
    measured_on = run(problem, num_passes=1, repetitions=repetitions)
    what = {
        "chunked_memory_ratio": "peak memory, forward and backward, over the plain loss on all positions at once",
        "chunked_time_ratio": "processor time, forward and backward, over the plain loss on all positions at once",
    }
    ratios = {key: measured_on.pop(key) for key in what}
    return {key: Figure(value=ratios[key], measured_on={"what": what[key], **measured_on}) for key in what}


def _max_rss_bytes() -> int:
    """Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary-size", type=int, default=151_936)
    parser.add_argument("--num-positions", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=896)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--positions-per-chunk", type=int, default=Trainer().positions_per_chunk)
    parser.add_argument("--passes", type=int, default=1, help="forward and backward passes in one process")
    parser.add_argument("--repetitions", type=int, default=1, help="processes per variant")
    arguments = parser.parse_args()
    problem = Problem(
        vocabulary_size=arguments.vocabulary_size,
        num_positions=arguments.num_positions,
        hidden_size=arguments.hidden_size,
        k=arguments.k,
        positions_per_chunk=arguments.positions_per_chunk,
    )
    print(json.dumps(run(problem, num_passes=arguments.passes, repetitions=arguments.repetitions), indent=2))


if __name__ == "__main__":
    main()
