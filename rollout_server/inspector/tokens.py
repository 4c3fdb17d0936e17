"""Converts a recorded or live token for the client, adding the policy's moving average and alternatives' texts."""

import numpy as np

from common.config import AdaSwitch, Policy
from rollout_server.inspector import models
from rollout_server.policies import moving_average
from rollout_server.traces.records import TokenRecord


def moving_averages(policy: Policy | None, divergences: list[float | None], first: int) -> list[float | None]:
    """[n - first] nats. The moving average at each position from ``first`` on; None if the policy has none."""
    if not isinstance(policy, AdaSwitch):
        return [None] * (len(divergences) - first)
    average = moving_average(np.array(divergences, np.float32), policy.window, first).tolist()
    return [
        mean if divergence is not None and np.isfinite(mean) else None
        for mean, divergence in zip(average, divergences[first:], strict=True)
    ]


def shown_token(token: TokenRecord, average: float | None, texts: dict[int, str]) -> models.Token:
    """``texts``: texts by token id. An alternative that is not in it gets None."""
    values = {name: getattr(token, name) for name in models.Token.model_fields if name in TokenRecord.__slots__}
    return models.Token(
        moving_average=average,
        student_top=_alternatives(token.student_top_ids, token.student_top_logprobs, texts),
        teacher_top=_alternatives(token.teacher_top_ids, token.teacher_top_logprobs, texts),
        **values,
    )


def _alternatives(
    ids: list[int] | None, logprobs: list[float] | None, texts: dict[int, str]
) -> list[models.Alternative] | None:
    if ids is None or logprobs is None:
        return None
    return [
        models.Alternative(token_id=i, text=texts.get(i), logprob=max(p, -1e30))  # JSON has no -infinity
        for i, p in zip(ids, logprobs, strict=True)
    ]
