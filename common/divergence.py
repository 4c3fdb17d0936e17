"""Divergences between two distributions over the same buckets. The switch policies and the loss use the same code.

A bucket is a token or a merged set of tokens. Merging never increases an f-divergence (data-processing inequality), so
a value computed here on merged buckets is a lower bound of the full-vocabulary divergence.

Suffixes: _M is the bucket axis, which comes last. All values are in nats, except the total variation distance, which is
a probability.
"""

import math

import torch
from torch import Tensor

from common.config import JSD, TVD, Divergence, ForwardKL, ReverseKL, SkewedKL


def divergence(log_p_M: Tensor, log_q_M: Tensor, kind: Divergence) -> Tensor:
    """Divergence of each row, [...] from two [..., M] tensors of log-probabilities (p teacher, q student).

    forward KL         sum p (log p - log q)
    reverse KL         sum q (log q - log p)
    JSD(beta)          beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q   (GKD, arXiv 2306.13649)
    skewed KL(alpha)   KL(p || alpha p + (1 - alpha) q), at most log(1 / alpha)   (DistiLLM, arXiv 2402.03898)
    TVD                sum |p - q| / 2: a probability, 0 to 1, not nats   (f-distill, arXiv 2307.15190)

    Reverse KL and JSD are known to be unstable as losses when the listed buckets cover little of p: check the covered
    mass. An empty bucket has log-prob -inf, and 0 log 0 is 0. The forward KL is +inf if p has mass where q has none,
    and the reverse KL if q has mass where p has none. The others stay finite.
    Differentiable in both arguments.
    """
    match kind:
        case ForwardKL():
            return _kl(log_p_M, log_q_M)
        case ReverseKL():
            return _kl(log_q_M, log_p_M)
        case JSD(beta=beta):
            log_m_M = _log_mixture(log_p_M, log_q_M, beta)
            return beta * _kl(log_p_M, log_m_M) + (1.0 - beta) * _kl(log_q_M, log_m_M)
        case SkewedKL(alpha=alpha):
            return _kl(log_p_M, _log_mixture(log_p_M, log_q_M, alpha))
        case TVD():
            return 0.5 * (log_p_M.exp() - log_q_M.exp()).abs().sum(dim=-1)


def _kl(log_p_M: Tensor, log_q_M: Tensor) -> Tensor:
    """KL(p || q) over the last axis. Empty buckets are masked before the subtraction, so gradients have no NaN."""
    has_mass_M = log_p_M > -torch.inf
    log_p_safe_M = log_p_M.where(has_mass_M, 0.0)
    terms_M = log_p_safe_M.exp() * (log_p_safe_M - log_q_M.where(has_mass_M, 0.0))
    return terms_M.where(has_mass_M, 0.0).sum(dim=-1)


def _log_mixture(log_p_M: Tensor, log_q_M: Tensor, beta: float) -> Tensor:
    """log(beta p + (1 - beta) q). Buckets that are empty on both sides stay empty and get no gradient."""
    has_mass_M = (log_p_M > -torch.inf) | (log_q_M > -torch.inf)
    mixture_M = torch.logaddexp(
        log_p_M.where(has_mass_M, 0.0) + math.log(beta), log_q_M.where(has_mass_M, 0.0) + math.log(1.0 - beta)
    )
    return mixture_M.where(has_mass_M, -torch.inf)
