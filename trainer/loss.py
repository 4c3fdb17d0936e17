"""The distillation loss, position by position, on the teacher's k ids and one bucket for the rest. Pure functions.

N = positions, C = positions of one chunk, H = hidden size, V = the student's (padded) vocabulary,
k = the teacher's list, M = k + 1 buckets: the listed ids and the tail. Everything is in nats.

The student's full logits are at hand, so its tail is exact and so is the divergence on these k + 1 buckets. It is a
lower bound of the full-vocabulary one, and equal to it when k is the vocabulary (there is no tail then).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.config import Divergence
from common.divergence import divergence

OutputLayer = Callable[[Tensor], Tensor]
"""[C, H] hidden states -> [C, V] logits."""

SMALLEST_TAIL = 1e-7
"""The teacher's tail is never taken to be less: below, 1 - sum(p) is float32 noise, and log 0 would make the reverse KL
infinite wherever the list happens to add up to 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PositionLosses:
    """What the loss knows of each position."""

    losses: Tensor  # [N] nats, differentiable
    covered_mass: Tensor  # [N] probability of the teacher on the listed ids that the student has, at most 1

    def __post_init__(self) -> None:
        assert self.losses.shape == self.covered_mass.shape, (self.losses.shape, self.covered_mass.shape)


def distillation_losses(
    hidden_NH: Tensor,
    output_layer: OutputLayer,
    teacher_ids_Nk: Tensor,
    teacher_logprobs_Nk: Tensor,
    kind: Divergence,
    positions_per_chunk: int,
) -> PositionLosses:
    """Divergence of the student from the teacher at each position; not averaged.

    Logits exist for one chunk of positions at a time, going forward and again, recomputed, going backward.
    """
    assert positions_per_chunk >= 1, positions_per_chunk
    chunks = [
        checkpoint(
            _chunk_losses,
            hidden_CH,
            output_layer,
            ids_Ck,
            logprobs_Ck,
            kind,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for hidden_CH, ids_Ck, logprobs_Ck in zip(
            torch.split(hidden_NH, positions_per_chunk),
            torch.split(teacher_ids_Nk, positions_per_chunk),
            torch.split(teacher_logprobs_Nk, positions_per_chunk),
            strict=True,
        )
    ]
    return PositionLosses(
        losses=torch.cat([losses for losses, _ in chunks]), covered_mass=torch.cat([mass for _, mass in chunks])
    )


def _chunk_losses(
    hidden_CH: Tensor, output_layer: OutputLayer, teacher_ids_Ck: Tensor, teacher_logprobs_Ck: Tensor, kind: Divergence
) -> tuple[Tensor, Tensor]:
    logits_CV = at_least_float32(output_layer(hidden_CH))
    log_p_CM = teacher_buckets(teacher_ids_Ck, teacher_logprobs_Ck.to(logits_CV.dtype), logits_CV.shape[-1])
    log_q_CM = student_buckets(teacher_ids_Ck, logits_CV)
    return divergence(log_p_CM, log_q_CM, kind), log_p_CM[:, :-1].exp().sum(dim=-1).clamp(max=1.0)


def teacher_buckets(teacher_ids_Nk: Tensor, teacher_logprobs_Nk: Tensor, vocabulary_size: int) -> Tensor:
    """[N, M] log-probs of the listed ids and of the tail.

    An id past the student's vocabulary (the teacher's padding is longer) is an empty bucket; its mass joins the tail.
    Where the list holds the student's whole vocabulary the tail is empty: what is missing to 1 is rounding.
    """
    known_Nk = teacher_ids_Nk < vocabulary_size
    log_p_Nk = teacher_logprobs_Nk.where(known_Nk, -torch.inf)
    tail_N1 = (1.0 - log_p_Nk.double().exp().sum(dim=-1, keepdim=True)).clamp(min=SMALLEST_TAIL)
    log_tail_N1 = tail_N1.log().to(log_p_Nk.dtype).where(_has_tail(known_Nk, vocabulary_size), -torch.inf)
    return torch.cat([log_p_Nk, log_tail_N1], dim=-1)


def student_buckets(teacher_ids_Nk: Tensor, logits_NV: Tensor) -> Tensor:
    """[N, M] the student's log-probs on the same buckets, by its full softmax.

    The tail is the logsumexp of the logits with the listed ids masked out, less the logsumexp of all: 1 - sum(q) would
    lose every digit of a small tail.
    """
    known_Nk = teacher_ids_Nk < logits_NV.shape[-1]
    # Ids the student lacks point at one it has, listed first by the teacher, so that gather and scatter stay in range.
    first_known_N1 = teacher_ids_Nk.gather(1, known_Nk.to(torch.uint8).argmax(dim=-1, keepdim=True))
    ids_Nk = teacher_ids_Nk.where(known_Nk, first_known_N1)
    log_z_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
    log_q_Nk = (logits_NV.gather(1, ids_Nk) - log_z_N1).where(known_Nk, -torch.inf)

    has_tail_N1 = _has_tail(known_Nk, logits_NV.shape[-1])
    # A row without a tail is filled with 0, not -inf: the logsumexp of nothing has no gradient.
    fill_N1 = torch.zeros_like(log_z_N1).masked_fill(has_tail_N1, -torch.inf)
    log_rest_N1 = logits_NV.scatter(1, ids_Nk, fill_N1.expand_as(ids_Nk)).logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_q_Nk, (log_rest_N1 - log_z_N1).where(has_tail_N1, -torch.inf)], dim=-1)


def at_least_float32(logits: Tensor) -> Tensor:
    """Half-precision logits as float32: a softmax over a large vocabulary needs it. Float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _has_tail(known_Nk: Tensor, vocabulary_size: int) -> Tensor:
    """[N, 1] Whether the student has ids that the list does not hold."""
    return known_Nk.sum(dim=-1, keepdim=True) < vocabulary_size
