"""Part (a): the learner on the device, held against plain computations and against itself.

N = positions, H = hidden size, V = vocabulary, k = the teacher's list, as in ``trainer/loss.py``.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.config import JSD, TVD, CrossEntropy, ForwardKL, Loss, ReverseKL, SkewedKL, Trainer
from common.divergence import divergence
from common.sequence import MixedSequence
from tests.gpu.context import Context
from tests.gpu.learner_costs import activation_memory, loss_beside_liger, loss_cost, throughput
from tests.gpu.models import TINY, random_sequences
from tests.gpu.ranks import ranks_nccl
from tests.gpu.records import Figures, NotRun
from trainer.batch import collate
from trainer.learner import Learner
from trainer.loss import Targets, distillation_losses, teacher_buckets

LOSSES: tuple[Loss, ...] = (ForwardKL(), ReverseKL(), JSD(), SkewedKL(), TVD(), CrossEntropy())
LENGTHS = [(5, 9), (12, 20), (1, 30), (7, 2), (20, 17), (3, 25)]
MAX_GRAD_NORM = 0.5  # below the gradient's norm here, so that clipping is compared too

FLOAT64_BOUND = 1e-9
"""Relative. Sums in another order differ by some 1e-14; a wrong term by far more."""
BF16_LOSS_BOUND = 0.003
"""Relative, of the mean loss. bfloat16 keeps 8 bits, about 0.4%, of every product's factors, and errors average out:
3e-4 on a processor."""
BF16_COSINE_BOUND = 0.999
"""Of the bfloat16 gradient and the float32 one, over all parameters; 0.9999 on a processor."""


def loss_float64(context: Context, figures: Figures) -> None:
    """Both sides on the same numbers: ours on the device in chunks, a plain one on the processor by autograd."""
    num_rows, hidden, vocabulary, k = 96, 48, 1000, 16
    random = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(num_rows, hidden, generator=random, dtype=torch.float64)
    weight_VH = torch.randn(vocabulary, hidden, generator=random, dtype=torch.float64) * 0.3
    (sequence,) = random_sequences([(1, num_rows)], vocabulary, k=k)
    batch = collate([sequence])
    targets = Targets(
        token_ids=batch.token_ids,
        teacher_ids=batch.teacher_ids,
        teacher_logprobs=batch.teacher_logprobs.double(),
        weights=torch.rand(num_rows, generator=random, dtype=torch.float64),
    )
    on_device = replace(targets, **{name: getattr(targets, name).to(context.device) for name in Targets.__slots__})

    def ours(hidden_NH: Tensor, layer: nn.Linear, kind: Loss) -> Tensor:
        return distillation_losses(hidden_NH, layer, on_device, kind, positions_per_chunk=40).total

    def plain(hidden_NH: Tensor, layer: nn.Linear, kind: Loss) -> Tensor:
        return (targets.weights * plain_losses(layer(hidden_NH), targets, kind)).sum()

    for kind in LOSSES:
        mine = _loss_and_gradients(ours, hidden_NH.to(context.device), weight_VH.to(context.device), kind)
        reference = _loss_and_gradients(plain, hidden_NH, weight_VH, kind)
        worst = max(relative_difference(left.cpu(), right) for left, right in zip(mine, reference, strict=True))
        figures.add(f"{kind.type}, relative difference", worst, "", at_most=FLOAT64_BOUND)


def step_float64(context: Context, figures: Figures) -> None:
    """The learner on the device, several micro-batches; beside it one text after the other on the processor."""
    folder = context.model(TINY)
    sequences = random_sequences(LENGTHS, TINY.vocabulary, k=16)
    config = Trainer(
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=MAX_GRAD_NORM,
        tokens_per_micro_batch=80,
        packing=False,
        num_threads=1,
    )
    learner = Learner(str(folder), config, seed=0)
    learner.model.double()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    optimizer = _plain_optimizer(model, config)
    reports = [learner.step(sequences) for _ in range(2)]
    plain = [_plain_step(model, optimizer, sequences, config) for _ in range(2)]
    assert min(norm for _, norm in plain) > 2 * MAX_GRAD_NORM, "the gradient must be clipped"
    for number, (report, (loss, norm)) in enumerate(zip(reports, plain, strict=True), start=1):
        figures.add(f"loss of step {number}, relative difference", abs(report.loss / loss - 1), "", at_most=1e-9)
        figures.add(f"grad_norm of step {number}, relative", abs(report.grad_norm / norm - 1), "", at_most=1e-9)
    expected = dict(model.named_parameters())
    moved = max(
        float((parameter.detach().cpu() - expected[name].detach()).abs().max())
        for name, parameter in learner.model.named_parameters()
    )
    # AdamW divides by the gradient's size: where a gradient is 1e-12, float64's noise in it shows.
    figures.add("parameters, difference over the learning rate", moved / config.learning_rate, "", at_most=1e-4)


def bfloat16(context: Context, figures: Figures) -> None:
    losses, gradients = zip(
        *(_gradient(context, dtype=dtype, packing=False) for dtype in ("float32", "bfloat16")), strict=True
    )
    figures.add("loss, relative difference", abs(losses[1] / losses[0] - 1), "", at_most=BF16_LOSS_BOUND)
    figures.add("gradient, cosine", cosine(*gradients), "", at_least=BF16_COSINE_BOUND)
    figures.add("gradient, relative difference", relative_difference(gradients[1], gradients[0]), "")


def packing(context: Context, figures: Figures) -> None:
    """In float64, so that kernels which add in another order make no difference."""
    padded, packed = (_gradient(context, packing=packing, double=True) for packing in (False, True))
    figures.add("loss, relative difference", abs(packed[0] / padded[0] - 1), "", at_most=FLOAT64_BOUND)
    figures.add("gradient, relative difference", relative_difference(packed[1], padded[1]), "", at_most=FLOAT64_BOUND)


def packing_flash(context: Context, figures: Figures) -> None:
    """Both in bfloat16: what is left is the two kernels' rounding."""
    from transformers.utils import is_flash_attn_2_available

    context.needs_cuda("flash attention needs a GPU")
    if not is_flash_attn_2_available():
        raise NotRun("flash_attn is not installed")
    padded, packed = (_gradient(context, packing=packing, dtype="bfloat16") for packing in (False, "auto"))
    figures.add("loss, relative difference", abs(packed[0] / padded[0] - 1), "", at_most=BF16_LOSS_BOUND)
    figures.add("gradient, cosine", cosine(padded[1], packed[1]), "", at_least=BF16_COSINE_BOUND)


def activation_checkpointing(context: Context, figures: Figures) -> None:
    kept, again = (_gradient(context, double=True, activation_checkpointing=on, packing=False) for on in (False, True))
    figures.add("loss, relative difference", abs(again[0] / kept[0] - 1), "", at_most=FLOAT64_BOUND)
    figures.add("gradient, relative difference", relative_difference(again[1], kept[1]), "", at_most=FLOAT64_BOUND)
    if context.is_cuda:
        activation_memory(context, figures)


CHECKS: dict[str, Callable[[Context, Figures], None]] = {
    "loss_float64": loss_float64,
    "step_float64": step_float64,
    "bfloat16": bfloat16,
    "packing": packing,
    "packing_flash": packing_flash,
    "activation_checkpointing": activation_checkpointing,
    "loss_cost": loss_cost,
    "loss_beside_liger": loss_beside_liger,
    "throughput": throughput,
    "ranks_nccl": ranks_nccl,
}


# -------------------------------------------------------------------------------------------------- plain computations


def plain_losses(logits_NV: Tensor, targets: Targets, kind: Loss) -> Tensor:
    """[N] The losses by definition, from all logits at once."""
    if isinstance(kind, CrossEntropy):
        return nn.functional.cross_entropy(logits_NV, targets.token_ids, reduction="none")
    rest_N1 = logits_NV.scatter(1, targets.teacher_ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    log_q_NM = torch.cat([logits_NV.gather(1, targets.teacher_ids), rest_N1], dim=-1).log_softmax(dim=-1)
    log_p_NM = teacher_buckets(targets.teacher_ids, targets.teacher_logprobs, logits_NV.shape[-1])
    return divergence(log_p_NM, log_q_NM, kind)


def _loss_and_gradients(
    loss_of: Callable[[Tensor, nn.Linear, Loss], Tensor], hidden_NH: Tensor, weight_VH: Tensor, kind: Loss
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_NH = hidden_NH.clone().requires_grad_()
    layer = nn.Linear(*reversed(weight_VH.shape), bias=False, device=weight_VH.device, dtype=weight_VH.dtype)
    layer.weight.data.copy_(weight_VH)
    loss = loss_of(hidden_NH, layer, kind)
    loss.backward()
    assert hidden_NH.grad is not None
    assert layer.weight.grad is not None
    return loss.detach(), hidden_NH.grad, layer.weight.grad


def _plain_optimizer(model: PreTrainedModel, config: Trainer) -> torch.optim.AdamW:
    """As the learner's should be: decay for matrices alone, no fused kernels."""
    matrices, others = [], []
    for parameter in model.parameters():
        (matrices if parameter.ndim >= 2 else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, foreach=False)


def _plain_step(
    model: PreTrainedModel, optimizer: torch.optim.AdamW, sequences: list[MixedSequence], config: Trainer
) -> tuple[float, float]:
    """Loss and the gradient's norm of one update on the mean loss over all new tokens."""
    optimizer.zero_grad()
    num_tokens = sum(map(len, sequences))
    total = 0.0
    for sequence in sequences:
        batch = collate([sequence])
        targets = Targets(
            token_ids=batch.token_ids,
            teacher_ids=batch.teacher_ids,
            teacher_logprobs=batch.teacher_logprobs.double(),
            weights=torch.ones(len(sequence), dtype=torch.float64),
        )
        logits_NV = model(input_ids=batch.input_ids).logits[0][batch.hidden_rows]
        loss = plain_losses(logits_NV, targets, config.loss).sum() / num_tokens
        loss.backward()
        total += float(loss.detach())
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
    optimizer.step()
    return total, norm


def _gradient(context: Context, *, double: bool = False, **knobs: Any) -> tuple[float, Tensor]:
    """Loss and flat gradient, float64 on the processor, of one step of the learner on the same texts."""
    config = Trainer(learning_rate=1e-3, max_grad_norm=1e9, tokens_per_micro_batch=100, num_threads=1, **knobs)
    learner = Learner(str(context.model(TINY)), config, seed=0)
    if double:
        learner.model.double()
    caught: list[Tensor] = []

    def catch(*_: object) -> None:
        grads = [parameter.grad for parameter in learner.model.parameters()]
        caught.append(torch.cat([grad.detach().flatten().double().cpu() for grad in grads if grad is not None]))

    learner.optimizer.register_step_pre_hook(catch)
    report = learner.step(random_sequences(LENGTHS, TINY.vocabulary, k=16))
    return report.loss, caught[0]


def relative_difference(left: Tensor, right: Tensor) -> float:
    """|left - right| / |right|, over all numbers together."""
    return float((left.double() - right.double()).norm() / right.double().norm())


def cosine(left: Tensor, right: Tensor) -> float:
    return float(nn.functional.cosine_similarity(left, right, dim=0))
