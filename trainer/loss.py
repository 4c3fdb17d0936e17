"""The distillation loss on the teacher's top k and one bucket for the rest, one chunk of positions at a time.

N = positions, C = positions of one chunk, H = hidden size, V = the student's (padded) vocabulary size, k = the
teacher's listed ids, M = k + 1 buckets: the listed ids and the tail. Losses are in nats; TVD is a probability.

The student's full logits are available, so its tail and the divergence on these k + 1 buckets are exact. The divergence
is a lower bound of the full-vocabulary one, and equal to it if k is the vocabulary size, where there is no tail.

Let x be the logits, s the logits of the listed ids, and r the logsumexp of all others. The student's log-probs on the
buckets are log_softmax([s, r]). This keeps full precision for a small tail, and computing r takes one pass over the
vocabulary. By the chain rule d loss / d x_v is d loss / d s for a listed id, and d loss / d r times exp(x_v - r) for
any other. So the gradient of a chunk is computed together with its loss and propagated to the hidden states and the
output layer at once, as in Liger's fused linear cross-entropy (arXiv 2410.10989). Logits are computed once, are in
memory for one chunk only, and are overwritten by their gradient.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.config import CrossEntropy, Divergence, ForwardKL, Loss
from common.divergence import divergence
from trainer.sharding import whole

SMALLEST_TAIL = 1e-7
"""Lower limit of the teacher's tail. Below it, 1 - sum(p) is float32 rounding noise, and log 0 would make the reverse
KL infinite wherever the list sums to 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Targets:
    """The targets of the student at each position. They get no gradient."""

    token_ids: Tensor  # [N] int64. The token in the sequence
    teacher_ids: Tensor  # [N, k] int64
    teacher_logprobs: Tensor  # [N, k] nats
    weights: Tensor  # [N] weight of each position's loss in the sum

    def __post_init__(self) -> None:
        assert self.teacher_ids.shape == self.teacher_logprobs.shape, self.teacher_ids.shape
        for name in ("token_ids", "teacher_ids", "weights"):
            assert len(getattr(self, name)) == len(self.token_ids), f"{name} must have {len(self.token_ids)} rows"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PositionLosses:
    """The losses of all positions, and their weighted sum, which is differentiable."""

    total: Tensor  # [] sum of weight x loss, differentiable once
    losses: Tensor  # [N] nats, not weighted, no gradient
    covered_mass: Tensor  # [N] teacher's probability of the listed ids in the student's vocabulary, at most 1

    def __post_init__(self) -> None:
        assert self.losses.shape == self.covered_mass.shape, (self.losses.shape, self.covered_mass.shape)

    def detached(self) -> "PositionLosses":
        """A copy whose ``total`` is detached from the graph."""
        return replace(self, total=self.total.detach())

    def to(self, device: torch.device) -> "PositionLosses":
        """A copy on a device."""
        return PositionLosses(
            total=self.total.to(device), losses=self.losses.to(device), covered_mass=self.covered_mass.to(device)
        )


def distillation_losses(
    hidden_NH: Tensor, output_layer: nn.Linear, targets: Targets, kind: Loss, positions_per_chunk: int
) -> PositionLosses:
    """Loss of the student at each position, and the weighted sum of the losses.

    The gradient is computed in the forward pass, so the weights are fixed there: ``total`` may be scaled afterwards,
    its parts may not, and the gradient can't be differentiated again. Under autocast the matrix products use its dtype.
    The softmax is in float32 or better, and the sum over chunks in the parameter's own dtype. An output layer that is
    sharded over the learner's ranks is gathered here, so this is a collective then.
    """
    assert positions_per_chunk >= 1, positions_per_chunk
    device = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
    loss_dtype = torch.promote_types(dtype, torch.float32)
    log_p_NM = teacher_buckets(
        targets.teacher_ids, targets.teacher_logprobs.to(loss_dtype), vocabulary_size=output_layer.out_features
    )
    covered_mass_N = log_p_NM[:, :-1].exp().sum(dim=-1).clamp(max=1.0)
    ids_Nk, divergence_kind = targets.teacher_ids, kind
    if isinstance(kind, CrossEntropy):
        # Cross-entropy is the forward KL from a distribution with all its mass on the token.
        ids_Nk, divergence_kind = targets.token_ids[:, None], ForwardKL()
        log_p_NM = torch.zeros_like(log_p_NM[:, :2])
        log_p_NM[:, 1] = -torch.inf
    with torch.autocast(device, enabled=False):
        total, losses_N = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden_NH.to(dtype),
            whole(output_layer.weight),
            None if output_layer.bias is None else whole(output_layer.bias),
            ids_Nk,
            log_p_NM,
            targets.weights.to(loss_dtype),
            divergence_kind,
            positions_per_chunk,
        )
    return PositionLosses(total=total, losses=losses_N, covered_mass=covered_mass_N)


def teacher_buckets(teacher_ids_Nk: Tensor, teacher_logprobs_Nk: Tensor, vocabulary_size: int) -> Tensor:
    """[N, M] log-probs of the listed ids and of the tail.

    An id beyond the student's vocabulary (the teacher's padding is longer) becomes an empty bucket, and its mass is
    added to the tail. If the list contains the student's whole vocabulary, the tail is empty: the difference to 1 is
    rounding.
    """
    known_Nk = teacher_ids_Nk < vocabulary_size
    has_tail_N1 = known_Nk.sum(dim=-1, keepdim=True) < vocabulary_size
    log_p_Nk = teacher_logprobs_Nk.where(known_Nk, -torch.inf)
    tail_N1 = (1.0 - log_p_Nk.double().exp().sum(dim=-1, keepdim=True)).clamp(min=SMALLEST_TAIL)
    return torch.cat([log_p_Nk, tail_N1.log().to(log_p_Nk.dtype).where(has_tail_N1, -torch.inf)], dim=-1)


def at_least_float32(logits: Tensor) -> Tensor:
    """Half-precision logits as float32, which a softmax over a large vocabulary needs. Float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _ChunkedLoss(torch.autograd.Function):
    """(hidden states, output layer) -> (sum of weight x divergence, divergences [N]), with gradients from forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        ids_Nk: Tensor,
        log_p_NM: Tensor,
        weights_N: Tensor,
        kind: Divergence,
        positions_per_chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = hidden_NH.dtype
        compute_weight_VH = weight_VH.to(dtype)  # once, not per chunk
        compute_bias_V = None if bias_V is None else bias_V.to(dtype)
        grads = [
            torch.zeros_like(tensor) if tensor is not None and needs_grad else None
            for tensor, needs_grad in zip((hidden_NH, weight_VH, bias_V), ctx.needs_input_grad, strict=False)
        ]
        grad_hidden_NH, grad_weight_VH, grad_bias_V = grads
        losses_N = torch.empty_like(weights_N)
        for first in range(0, len(hidden_NH), positions_per_chunk):
            rows = slice(first, first + positions_per_chunk)
            losses_N[rows], grad_logits_CV = _losses_and_gradient(
                at_least_float32(nn.functional.linear(hidden_NH[rows], compute_weight_VH, compute_bias_V)),
                ids_Nk[rows],
                log_p_NM[rows],
                weights_N[rows],
                kind,
            )
            if grad_bias_V is not None:
                grad_bias_V += grad_logits_CV.sum(dim=0).to(grad_bias_V.dtype)
            grad_logits_CV = grad_logits_CV.to(dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[rows] = grad_logits_CV @ compute_weight_VH
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH, grad_logits_CV.T, hidden_NH[rows])
            del grad_logits_CV  # frees it before the next chunk's logits are allocated
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(losses_N)
        return (weights_N * losses_N).sum(), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # The factor is usually 1. The output layer's gradient is large, so an unneeded copy is avoided.
        is_one = bool(grad_total == 1.0)
        grads = [grad if grad is None or is_one else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None, None, None, None


def _losses_and_gradient(
    logits_CV: Tensor, ids_Ck: Tensor, log_p_CM: Tensor, weights_C: Tensor, kind: Divergence
) -> tuple[Tensor, Tensor]:
    """[C] losses, and [C, V] gradient of their weighted sum, which overwrites the logits."""
    known_Ck = ids_Ck < logits_CV.shape[-1]
    # Ids that the student lacks are replaced by the row's first id that it has, to keep gather and scatter in range.
    # A row without such an id may use any id: all its mass is in the tail, and its loss and gradient are 0.
    first_known_C1 = ids_Ck.gather(1, known_Ck.to(torch.uint8).argmax(dim=-1, keepdim=True))
    ids_Ck = ids_Ck.where(known_Ck, first_known_C1).clamp(max=logits_CV.shape[-1] - 1)
    listed_Ck = logits_CV.gather(1, ids_Ck).where(known_Ck, -torch.inf)

    rest_CV = logits_CV.scatter_(1, ids_Ck, -torch.inf)
    largest_C1 = rest_CV.amax(dim=-1, keepdim=True)
    largest_C1 = largest_C1.masked_fill(largest_C1 == -torch.inf, 0.0)  # the whole vocabulary is listed
    rest_CV = rest_CV.sub_(largest_C1).exp_()
    rest_sum_C1 = rest_CV.sum(dim=-1, keepdim=True)

    scores_CM = torch.cat([listed_Ck, rest_sum_C1.log() + largest_C1], dim=-1)
    with torch.enable_grad():
        scores_CM.requires_grad_()
        losses_C = divergence(log_p_CM, scores_CM.log_softmax(dim=-1), kind)
        (grad_CM,) = torch.autograd.grad(losses_C, scores_CM, weights_C)

    rest_factor_C1 = (grad_CM[:, -1:] / rest_sum_C1).masked_fill(rest_sum_C1 == 0.0, 0.0)
    grad_logits_CV = rest_CV.mul_(rest_factor_C1).scatter_add_(1, ids_Ck, grad_CM[:, :-1].where(known_Ck, 0.0))
    return losses_C.detach(), grad_logits_CV


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place. The sum is in total's own dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
